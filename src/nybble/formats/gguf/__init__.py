"""GGUF, the format of llama.cpp: reader, config, tensor names, checkpoint."""

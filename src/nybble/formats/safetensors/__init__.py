"""safetensors: Hugging Face's file of named tensors. https://huggingface.co/docs/safetensors"""

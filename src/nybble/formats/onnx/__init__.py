"""ONNX: folders for ONNX Runtime, read and written."""

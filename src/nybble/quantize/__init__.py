"""Quantization: methods, calibration, importance matrices."""

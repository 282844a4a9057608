"""Hugging Face folders: config.json and what lies beside it."""

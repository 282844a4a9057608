"""File formats that models come in: one package a format."""

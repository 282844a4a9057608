"""Measuring models: how fast they run."""

"""The reference device: runs a graph with NumPy, float32, one operator at a time.

Slow and plain: what other devices are tested against. Weights are decoded once and kept; each
sequence has a dense cache of its own.
"""

from nybble.devices.reference.session import ReferenceSequence, ReferenceSession, compile_session

__all__ = ["ReferenceSequence", "ReferenceSession", "compile_session"]

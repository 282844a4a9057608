"""Every error that nybble raises on purpose, so that callers can catch one base class.

A message says what is wrong, where (file, tensor, offset, value) and what to do.
"""

from __future__ import annotations


class NybbleError(Exception):
    """Base class of nybble's own errors."""


class FormatError(NybbleError):
    """A model file is truncated, corrupt, hostile or of an unknown version."""


class UnsupportedError(NybbleError):
    """The input is valid, but nybble cannot do this: the message lists what it can do."""


class NotFoundError(NybbleError):
    """A model, a file or a tensor does not exist."""


class ConversionError(NybbleError):
    """A conversion would lose something that nobody agreed to lose, or is not possible at all."""


class DownloadError(NybbleError):
    """A download failed: no network, wrong checksum, refused, or disk full."""


class TemplateError(NybbleError):
    """A chat template is invalid, too slow, too large, or refused the messages."""


class DeviceError(NybbleError):
    """A device is missing or cannot run this model."""


class OutOfMemoryError(NybbleError):
    """The KV cache or a buffer would not fit the limit that was set."""


class ContextLengthError(NybbleError):
    """A sequence would grow past the context length that the session allows."""


class Cancelled(NybbleError):
    """The computation was cancelled from another thread."""

"""Getting models: names, the shared cache, and downloads that resume and are checked.

`resolve` turns what a user types into a file on disk. Importing this package is cheap: the network code is
imported when something is downloaded.
"""

from nybble.hub.cache import CachedModel, cache_folder, list_models, remove
from nybble.hub.known import DEFAULT_MODEL, KNOWN_MODELS, KnownModel
from nybble.hub.progress import ProgressCallback, Transfer, progress_display
from nybble.hub.resolve import is_offline, pull, resolve

__all__ = [
    "DEFAULT_MODEL",
    "KNOWN_MODELS",
    "CachedModel",
    "KnownModel",
    "ProgressCallback",
    "Transfer",
    "cache_folder",
    "is_offline",
    "list_models",
    "progress_display",
    "pull",
    "remove",
    "resolve",
]

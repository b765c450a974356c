"""Where lorakit keeps what it makes once: converted models."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder named by the environment variable LORAKIT_HOME, or else the platform's cache folder.

    >>> cache_folder().is_absolute()
    True
    """
    if home := os.environ.get("LORAKIT_HOME"):
        return Path(home).expanduser().absolute()
    import platformdirs

    return platformdirs.user_cache_path("lorakit")

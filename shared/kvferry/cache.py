"""Where this user's caches lie: fetched models, built kernel libraries, packed weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

CACHE_SETTING: Final = "KVFERRY_CACHE"


def cache_dir() -> Path:
    """KVFERRY_CACHE, else kvferry/ in XDG_CACHE_HOME, else ~/.cache/kvferry."""
    if own := os.environ.get(CACHE_SETTING):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "kvferry"

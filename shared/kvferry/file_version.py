"""Whether files have changed since, by what the file system says of them."""

from __future__ import annotations

from pathlib import Path

FileVersion = tuple[tuple[int, int, int] | None, ...]  # of each file: time of its last change, size, inode


def version_of(*paths: Path) -> FileVersion:
    """A file that is not there, or not ours to see, has a version, too: None."""
    return tuple(_version(path) for path in paths)


def _version(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino

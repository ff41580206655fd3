"""Atomic file writes: after a crash or a full disk, a file has its old content or the new."""

import os
import secrets
import shutil
from pathlib import Path


def write(path: Path, content: bytes) -> None:
    """Writes a file and waits until it is on the disk. Raises OSError."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, content: str | bytes) -> None:
    """Writes under a temporary name, syncs and renames: readers see the old file or the new one. Raises OSError.

    The temporary name is this call's own: of two processes that write the same file, the last one's stays, whole.
    """
    temporary = path.with_name(f".{path.name}.by-{secrets.token_hex(8)}.tmp")
    try:
        write(temporary, content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def remove(path: Path) -> None:
    """Removes a file or a folder, as far as that is allowed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(directory: Path) -> None:
    """Waits until a directory's entries, such as a rename within it, are on the disk. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Write files so that a reader, or a crash, never meets half of one."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from lorakit.errors import LorakitError


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Fill a temporary folder beside `folder`; at the end it becomes `folder` in one step, or is gone after an error.

    Raises:
        LorakitError: the disk is full, or the place cannot be written; nothing is left behind.
    """
    with _said_clearly(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with _said_clearly(folder):
            yield temporary
            for path in temporary.rglob("*"):
                if path.is_file():
                    _sync(path)
            os.chmod(temporary, 0o755)
            os.replace(temporary, folder)
            _sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the named files into `folder`: a new folder appears whole, in an existing one each file is replaced whole.

    Raises:
        LorakitError: the disk is full, or the place cannot be written; what was there before is intact.
    """
    if not folder.exists():
        with new_folder(folder) as temporary:
            for name, content in files.items():
                (temporary / name).write_bytes(content)
        return
    with _said_clearly(folder), tempfile.TemporaryDirectory(prefix=".writing.", dir=folder) as temporary_name:
        staged = [(Path(temporary_name) / name, content) for name, content in files.items()]
        for path, content in staged:
            path.write_bytes(content)
            _sync(path)
        for path, _ in staged:
            os.replace(path, folder / path.name)
        _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _said_clearly(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else (error.strerror or str(error)).lower()
        raise LorakitError(f"{folder} could not be written: {reason}; nothing was changed there") from error

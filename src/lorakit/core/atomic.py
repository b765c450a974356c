"""Write files so that a reader, or a crash, never meets half of one."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from lorakit.errors import LorakitError, OutputExists

ONLY_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Fill a temporary folder beside `folder`; at the end it becomes `folder` in one step, or is gone after an error.

    Raises:
        LorakitError: the disk is full, or the place cannot be written; nothing is left behind.
    """
    done: list[str] = []
    with _said_clearly(folder, done):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with _said_clearly(folder, done, within=temporary):
            yield temporary
        with _said_clearly(folder, done):
            for path in temporary.rglob("*"):
                if path.is_file():
                    _sync(path)
            os.chmod(temporary, 0o755)
            os.replace(temporary, folder)
            done.append(folder.name)
            _sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A place to write a file that becomes `path` in one step at the end, or is gone after an error.

    Raises:
        OutputExists: `path` is there already.
        LorakitError: the disk is full, or the place cannot be written; nothing is left behind.
    """
    if path.exists():
        raise OutputExists(f"{path} exists already; name a new file")
    done: list[str] = []
    with _said_clearly(path, done):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)
    with temporary as name:
        with _said_clearly(path, done, within=Path(name)):
            yield Path(name) / path.name
        with _said_clearly(path, done):
            _sync(Path(name) / path.name)
            os.replace(Path(name) / path.name, path)
            done.append(path.name)
            _sync(path.parent)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the named files into `folder`: a new folder appears whole, in an existing one each file is replaced whole.

    In an existing folder all files are written beside their places first, and then renamed in the order given.

    Raises:
        LorakitError: the disk is full, or the place cannot be written; the message says which files are new, if any.
    """
    if not folder.exists():
        with new_folder(folder) as temporary:
            for name, content in files.items():
                (temporary / name).write_bytes(content)
        return
    done: list[str] = []
    with _said_clearly(folder, done), tempfile.TemporaryDirectory(prefix=".writing.", dir=folder) as temporary_name:
        staged = [(Path(temporary_name) / name, content) for name, content in files.items()]
        for path, content in staged:
            path.write_bytes(content)
            _sync(path)
        for path, _ in staged:
            os.replace(path, folder / path.name)
            done.append(path.name)
        _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _said_clearly(folder: Path, done: list[str], *, within: Path | None = None) -> Iterator[None]:
    """Say in a sentence that `folder` could not be written, and what was `done` before.

    With `within`, a folder that the caller's own code fills, errors that come from elsewhere are let through.
    """
    try:
        yield
    except OSError as error:
        if within is not None and not _is_of(within, error):
            raise
        reason = "the disk is full" if error.errno == errno.ENOSPC else (error.strerror or str(error)).lower()
        told = f"{' and '.join(done)} may be new there, all else is as it was" if done else "nothing was changed there"
        raise LorakitError(f"{folder} could not be written: {reason}; {told}") from error


def _is_of(folder: Path, error: OSError) -> bool:
    """Whether an error comes from writing into `folder`: reading never fills a disk."""
    names = [name for name in (error.filename, error.filename2) if isinstance(name, str | os.PathLike)]
    return error.errno in ONLY_OF_WRITING or any(Path(name).is_relative_to(folder) for name in names)

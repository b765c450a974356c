"""A GGUF file as a model folder: converted once, kept in the cache folder."""

from __future__ import annotations

import hashlib
import io
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from lorakit.errors import BadModel, LorakitError, MissingPackage
from lorakit.models.cache import cache_folder
from lorakit.models.quiet import quiet

MAGIC = b"GGUF"
FORMAT = "1"  # of the folders in the cache; a new number converts again


def convert(path: str | Path) -> Path:
    """The folder with safetensors, config and tokenizer that holds the same model as a GGUF file.

    The first call converts, which takes a while and shows a progress bar; the folder's name tells the file's content,
    so that every later call finds it. Two processes that ask at once convert once.

    Raises:
        BadModel: the file is no GGUF file, or of a kind that transformers cannot read.
        MissingPackage: gguf is not installed.
    """
    from filelock import FileLock

    path = Path(path)
    folder = cache_folder() / "models" / f"{path.stem}-{_digest(path)}"
    if folder.is_dir():
        return folder
    if not find_spec("gguf"):
        raise MissingPackage(f"reading {path} needs gguf; install it with: pip install gguf")
    with _writing(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                _convert(path, folder)
    return folder


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise BadModel(f"{path} is no GGUF file: it does not begin with {MAGIC.decode()}")
            return hashlib.file_digest(file, lambda: hashlib.sha256(FORMAT.encode())).hexdigest()[:16]
    except OSError as error:
        raise BadModel(f"{path} cannot be read: {error.strerror}") from error


def _convert(path: Path, folder: Path) -> None:
    """Write into a folder beside the final one, which appears whole or not at all."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    try:
        with _progress(f"Converting {path.name}, once", steps=4) as tell, quiet():
            for what, read in (("tokenizer", _tokenizer), ("weights", _model)):
                tell(f"reading {what}")
                part = read(path)
                tell(f"writing {what}")
                part.save_pretrained(unfinished)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def _progress(title: str, steps: int) -> Iterator[Callable[[str], None]]:
    """A bar on the error stream; what it yields names the next step."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, redirect_stdout=False, redirect_stderr=False) as progress:
        task = progress.add_task(title, total=steps, completed=-1)
        yield lambda step: progress.update(task, advance=1, description=f"{title}: {step}")
        progress.update(task, completed=steps, description=f"{title}: done")


def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    with _reading(path):
        return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, trust_remote_code=False)


def _model(path: Path) -> Any:
    """The model, free of the mark that it came from GGUF, which would forbid to save it."""
    from transformers import AutoModelForCausalLM

    with _reading(path):
        read = AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=torch.float32, trust_remote_code=False
        )
        del read.config.quantization_config
        with torch.device("meta"):
            fresh = AutoModelForCausalLM.from_config(read.config, trust_remote_code=False)
        fresh.load_state_dict(read.state_dict(), assign=True)
        fresh.tie_weights()
        return fresh


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Name the file in what goes wrong, and swallow the bar of the reader, which no setting switches off."""
    try:
        with redirect_stderr(io.StringIO()):
            yield
    except Exception as error:  # a file of any content meets many readers
        raise BadModel(f"{path} cannot be read as a GGUF language model: {error}") from error


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise LorakitError(
            f"the converted model cannot be written to {folder}: {error}; make room there, "
            "or name another folder in the environment variable LORAKIT_HOME"
        ) from error

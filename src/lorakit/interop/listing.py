"""Many adapters at a glance: what each file's header and config say, without reading a tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.core import registry
from lorakit.core.exchange import Exchange
from lorakit.core.files import CONFIG, PICKLE, TENSORS
from lorakit.core.pickles import SUFFIXES
from lorakit.errors import BadAdapterFile, BadModel, LorakitError
from lorakit.interop.format import Told
from lorakit.interop.reading import FORMATS, format_of
from lorakit.interop.shards import opened

SAFETENSORS = ".safetensors"
DEPTH = 3  # folders within folders that are looked through


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One adapter of a folder, or what is wrong with it."""

    name: str  # its path below the folder
    format: str = ""  # its title
    method: str = ""  # lorakit's name, or PEFT's type
    ranks: tuple[int, ...] = ()
    scales: tuple[float, ...] = ()
    targets: tuple[str, ...] = ()  # the last names of the layers
    parameters: int = 0
    bytes: int = 0  # of its files
    base: str | None = None
    faults: tuple[str, ...] = ()


def listing(folder: str | Path, told: Told | None = None) -> list[Listed]:
    """The adapters in a folder, whatever their formats, by name; broken ones with their faults.

    Args:
        folder: where they are, up to `DEPTH` folders deep; what is no adapter is passed over.
        told: what the files may not say (loralib: alpha).

    Raises:
        BadAdapterFile: there is no such folder.

    Example:
        >>> import tempfile
        >>> listing(tempfile.mkdtemp())
        []
    """
    root = Path(folder)
    if not root.is_dir():
        raise BadAdapterFile(root, ["there is no such folder"])
    return [listed(path, path.relative_to(root).as_posix(), told) for path in _adapters(root, DEPTH)]


def _adapters(folder: Path, depth: int) -> Iterator[Path]:
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        if is_adapter(path):
            yield path
        elif path.is_dir() and depth:
            yield from _adapters(path, depth - 1)


def is_adapter(path: Path) -> bool:
    """Whether a file or folder is an adapter, or looks like one that is damaged."""
    if path.is_dir() and any((path / name).is_file() for name in (CONFIG, TENSORS, PICKLE)):
        return True
    known = [registry.find(FORMATS, name) for name in registry.names(FORMATS)]
    return any(module.recognises(path) for module in known) or bool(_damage(path))


def _damage(path: Path) -> str:
    """Why a safetensors file cannot be opened; "" where it can, or is none."""
    if path.is_file() and path.suffix == SAFETENSORS:
        try:
            opened(path)
        except BadModel as error:
            return str(error)
    return ""


def listed(path: Path, name: str, told: Told | None = None) -> Listed:
    """What the adapter at `path` says of itself, or what is wrong with it."""
    size = size_of(path)
    if damage := _damage(path):
        return Listed(name=name, bytes=size, faults=(damage,))
    try:
        format: Any = format_of(path)
        return described(format.read(path, told or Told()), name=name, format=format.TITLE, size=size)
    except BadAdapterFile as error:
        return Listed(name=name, bytes=size, faults=tuple(error.faults))
    except (LorakitError, OSError) as error:
        return Listed(name=name, bytes=size, faults=(str(error),))


def described(exchange: Exchange, *, name: str, format: str, size: int) -> Listed:
    """The line of one adapter: `format` is its title, `size` the bytes of its files."""
    header = exchange.header or {"method": {"name": exchange.config.get("peft_type") or "LORA"}}
    targets = {update.path.rpartition(".")[2] for update in exchange.updates} or _listed_in(exchange.config)
    return Listed(
        name=name,
        format=format,
        method=header["method"]["name"],
        ranks=tuple(sorted({update.rank for update in exchange.updates})),
        scales=tuple(sorted({update.scale for update in exchange.updates})),
        targets=tuple(sorted(targets)),
        parameters=sum(value.numel for value in exchange.values),
        bytes=size,
        base=exchange.base,
    )


def _listed_in(config: Mapping[str, Any]) -> list[str]:
    told = config.get("target_modules")
    return [name for name in told if isinstance(name, str)] if isinstance(told, list) else []


def size_of(path: Path) -> int:
    """The bytes of an adapter's tensor files."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.suffix in (SAFETENSORS, *SUFFIXES) or file == path)

"""Rows of a data set on the Hugging Face hub, streamed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorakit.core.registry import names
from lorakit.data.declaration import Data, Source
from lorakit.data.read import Row
from lorakit.errors import BadData, MissingPackage, UnknownName, nearest


def source(data: Data) -> Source:
    """Open a hub data set: its split `train`, and `test` (or `validation`, or the split that the user names)."""
    data.refuse("path")
    splits = _splits(data)
    train = _split(splits, "train", data)
    usual = ("test", "validation") if data.test_share is None else ()
    test = data.test or next((name for name in usual if name in splits), None)
    if data.label and not data.labels:
        feature = (getattr(train, "features", None) or {}).get(data.label)
        data = replace(data, labels=tuple(getattr(feature, "names", None) or ()))
    place = f"{data.source}, split "
    return Source(
        data,
        _rows(train, place + "train"),
        _rows(_split(splits, test, data), place + test) if test else None,
    )


def _splits(data: Data) -> Mapping[str, Any]:
    try:
        import datasets
    except ImportError as error:
        raise MissingPackage(
            f"data set {data.source!r} of the hub needs datasets; install it with: pip install 'lorakit[data]'"
        ) from error
    streaming = _reachable(data)
    if not streaming and not _is_cached(data.source, Path(datasets.config.HF_DATASETS_CACHE)):
        raise UnknownName(
            f"there is no file {data.source!r}, and the hub, which may have such a data set, cannot be reached; "
            + nearest(data.source, names("lorakit.data.tasks"))
        )
    try:
        return datasets.load_dataset(data.source, data.subset, streaming=streaming)
    except (ValueError, OSError, RuntimeError) as error:
        raise BadData(f"data set {data.source!r} of the hub cannot be opened: {error}") from error


def _reachable(data: Data) -> bool:
    """One quick question to the hub, which also tells an unknown name."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        huggingface_hub.dataset_info(data.source, timeout=10)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UnknownName(
            f"{data.source!r} is neither a file nor a data set of the hub that you may read; "
            + nearest(data.source, names("lorakit.data.tasks"))
        ) from error
    except Exception:  # offline: every HTTP library has its own exception for it
        return False
    return True


def _is_cached(name: str, cache: Path) -> bool:
    return (cache / name.replace("/", "___").lower()).is_dir() or (cache / name.replace("/", "___")).is_dir()


def _split(splits: Mapping[str, Any], name: str, data: Data) -> Any:
    if name not in splits:
        raise BadData(f"data set {data.source!r} has no split {name!r}; {nearest(name, splits)}")
    return splits[name]


def _rows(split: Any, place: str) -> Iterator[Row]:
    number = 0
    try:
        for number, cells in enumerate(split, start=1):
            yield Row(f"{place}, row {number}", dict(cells))
    except (ValueError, OSError, RuntimeError) as error:
        raise BadData(f"{place}, after row {number}: cannot be read: {error}") from error

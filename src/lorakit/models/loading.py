"""From a name to a model and its tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from lorakit.core import registry
from lorakit.errors import BadModel, UnknownName, nearest
from lorakit.models.adopt import adopt
from lorakit.models.gguf import convert
from lorakit.models.gguf_blocks import keep_blocks
from lorakit.models.quantise import Quantise
from lorakit.models.quantise import quantise as keep_in_few_bits
from lorakit.models.quiet import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGED = "lorakit.models.packaged"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Place:
    """What transformers is asked for: a folder or a hub id, and whether it may use the network."""

    name: str
    local: bool
    gguf: Path | None = None  # the file that the folder was made from

    def options(self) -> dict[str, Any]:
        return {"local_files_only": self.local, "trust_remote_code": False}


def load(
    name: str,
    *,
    labels: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    quantise: Quantise = "none",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a pretrained model, in eval mode, and its tokenizer, which pads on the right.

    Args:
        name: a model that ships in a Python package ("smollm2-135m", "minilm-l6"), a folder, a GGUF file or a hub id.
        labels: give the model a classification head of so many classes; None: its language-model head, if it has one.
        dtype: of the weights.
        seed: of the values of a classification head that the files do not hold.
        quantise: keep the layers of attention and MLPs in fewer bits: "int8", "int4" (NormalFloat4), or "gguf" (the
            blocks of a GGUF file as they are). What bitsandbytes quantised before it was saved stays so.

    Raises:
        UnknownName: no such model; the message gives the nearest names.
        MissingPackage: the model's package is not installed, or that of a quantisation; says how to install it.
        BadModel: files that cannot be read, or that lack weights.

    Example:
        >>> model, tokenizer = load("minilm-l6")
        >>> type(model).__name__, tokenizer.padding_side
        ('BertModel', 'right')
    """
    if labels is not None and labels < 2:
        raise BadModel(f"a classification head needs two labels or more, not {labels}")
    if quantise not in get_args(Quantise):
        raise BadModel(f"quantise is one of {', '.join(get_args(Quantise))}, not {quantise!r}")
    place = _place(name)
    with _reading(name), quiet(bars=place.local), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = _tokenizer(place)
        model, report = _model(place, labels, dtype if quantise == "none" else "auto")
    _check(model, report, labels, name)
    with _reading(name):
        _keep(model, quantise, place, name)
    if quantise != "none":
        model.to(dtype).config.dtype = dtype
    for part in (model, model.config, tokenizer):
        part.name_or_path = name  # what an adapter's file says of its base; never a path of the cache
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def folder(name: str) -> Path:
    """The folder with the config and weights of a model that `load` knows; a hub model is downloaded.

    Raises:
        UnknownName, MissingPackage, BadModel: as `load` does.
    """
    place = _place(name)
    if Path(place.name).is_dir():
        return Path(place.name)
    import huggingface_hub

    with _reading(name):
        return Path(huggingface_hub.snapshot_download(place.name, local_files_only=place.local))


def gguf_file(name: str) -> Path:
    """The GGUF file of a model that `load` knows.

    Raises:
        BadModel: it is no GGUF file.
        MissingPackage: the package that holds it is not installed.
    """
    path = _path(name)
    if path.suffix.lower() != ".gguf" or not path.is_file():
        raise BadModel(f"{name} is no GGUF file, and only into one can GGUF be merged; name one with --base")
    return path


def writes(name: str) -> bool:
    """Whether the model writes text (it has a language-model head); its weights are not read.

    >>> writes("minilm-l6")
    False
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    place = _place(name)
    with _reading(name), quiet(bars=False):
        return _kind(AutoConfig.from_pretrained(place.name, **place.options()), None) is AutoModelForCausalLM


def _path(name: str) -> Path:
    """Where a model lies that is named by its path, or that ships in a package."""
    if name.replace("_", "-") in registry.names(PACKAGED):
        return registry.find(PACKAGED, name).model.path()
    return Path(name).expanduser()


def _place(name: str) -> _Place:
    path = _path(name)
    if path.suffix.lower() == ".gguf" and path.is_file():
        return _Place(str(convert(path)), local=True, gguf=path)
    if path.is_dir():
        return _Place(str(_checked(path)), local=True)
    if path.exists():
        raise BadModel(f"{path} is a file, not a model; name a GGUF file, or the folder with its config.json")
    if path.is_absolute() or name.startswith((".", "~")) or path.suffix.lower() == ".gguf" or name.count("/") > 1:
        beside = [entry.name for entry in path.parent.glob("*") if entry.is_dir() or entry.suffix == ".gguf"]
        raise UnknownName(f"there is no model {name}; among what is beside it: {nearest(path.name, beside)}")
    return _Place(name, local=not _on_hub(name))


def _checked(folder: Path) -> Path:
    if (folder / "config.json").is_file():
        return folder
    if (folder / "adapter_config.json").is_file():
        raise BadModel(f"{folder} holds an adapter, not a model; load its base, and the adapter onto it")
    inside = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8])
    raise BadModel(f"{folder} holds no config.json, so it is no model folder; it has: {inside or 'nothing'}")


def _on_hub(name: str) -> bool:
    """Whether the hub, asked once, has the model; False where it cannot be reached but the model is in its cache."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    known = nearest(name, registry.names(PACKAGED))
    try:
        huggingface_hub.model_info(name, timeout=10)
        return True
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UnknownName(f"{name!r} is neither a folder nor a model of the hub that you may read; {known}") from error
    except Exception as error:  # offline: every HTTP library has its own exception for it
        if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
            return False
        raise UnknownName(
            f"there is no folder {name!r}, and the hub, which may have such a model, cannot be reached; {known}"
        ) from error


def _tokenizer(place: _Place) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place.name, padding_side="right", **place.options())
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _model(
    place: _Place, labels: int | None, dtype: torch.dtype | Literal["auto"]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(place.name, **place.options())
    extra = {} if labels is None else {"num_labels": labels, "ignore_mismatched_sizes": True}
    kind = _kind(config, labels)
    return kind.from_pretrained(place.name, dtype=dtype, output_loading_info=True, **extra, **place.options())


def _keep(model: PreTrainedModel, width: Quantise, place: _Place, name: str) -> None:
    """Keep layers in few bits; in the dtype of the file, whose weights lie in mapped memory until they are packed."""
    found = adopt(model)
    if width == "gguf":
        if place.gguf is None:
            raise BadModel(f"{name} is no GGUF file, whose blocks could be kept; take quantise='int8' or 'int4'")
        keep_blocks(model, place.gguf)
    elif width != "none" and found and found != {width}:
        widths = " and ".join(sorted(found))
        raise BadModel(f"{name} is quantised already, in {widths}; leave quantise away, or name its original")
    elif width != "none" and not found:
        keep_in_few_bits(model, width)


def _kind(config: Any, labels: int | None) -> Any:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if labels is not None:
        return transformers.AutoModelForSequenceClassification
    decoders = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    named = config.architectures or [decoders.get(config.model_type)]
    return transformers.AutoModelForCausalLM if set(named) & set(decoders.values()) else transformers.AutoModel


def _check(model: PreTrainedModel, report: dict[str, Any], labels: int | None, name: str) -> None:
    """Refuse a body that did not load whole; a classification head or a pooler may be fresh, and that is said."""
    absent = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    body = f"{model.base_model_prefix}."
    fresh = [key for key in absent if "pooler." in key or (labels is not None and not key.startswith(body))]
    if lost := sorted(set(absent) - set(fresh)):
        listed = ", ".join(lost[:8]) + (f" and {len(lost) - 8} more" if len(lost) > 8 else "")
        raise BadModel(f"{name} is incomplete: its files do not hold {listed}")
    if fresh:
        unasked = labels is None or any("pooler." in key for key in fresh)
        log.log(logging.WARNING if unasked else logging.INFO, "%s: these weights are fresh: %s", name, ", ".join(fresh))


@contextmanager
def _reading(name: str) -> Iterator[None]:
    import pickle

    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, pickle.UnpicklingError) as error:
        raise BadModel(f"{name} cannot be loaded: {' '.join(str(error).split())}") from error

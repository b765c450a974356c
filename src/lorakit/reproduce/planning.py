"""Plan a run of any model: its config alone is read, and its weights need not exist."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from lorakit import models
from lorakit.core import registry
from lorakit.core.kinds import require_one_stack
from lorakit.core.method import Method
from lorakit.errors import BadModel, LorakitError, UnknownName
from lorakit.methods import DEFAULT
from lorakit.models.loading import PACKAGED
from lorakit.models.quiet import quiet
from lorakit.reproduce.run import with_head
from lorakit.train import Train
from lorakit.train.forecast import Forecast
from lorakit.train.machine import machine, usual_dtype
from lorakit.train.planner import Lengths, plan
from lorakit.train.settings import check, counts

CONFIG = "config.json"
SHAPES: Mapping[str, Mapping[str, Any]] = {  # models without a config to be found, as one
    "gpt3-175b": {
        **{"model_type": "gpt2", "n_layer": 96, "n_embd": 12288, "n_head": 96, "vocab_size": 50257},
        **{"n_positions": 2048, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        "tie_word_embeddings": False,  # as the count of 175,255.8 million in Hu et al. 2021 has it
    },
}


@dataclass(frozen=True, kw_only=True)
class Question:
    """A run to be planned, and the machine that it is planned for."""

    base: str  # a packaged model, a folder, a GGUF file, a hub id, a config.json, or gpt3-175b
    method: Method = field(default_factory=DEFAULT)  # how to adapt
    train: Train = field(default_factory=Train)  # batch size, accumulation and the longest example
    tokens: Lengths = field(default_factory=Lengths)  # how long the examples are
    machine: str | None = None  # cpu, cuda, or a known device such as h100; None: what is at hand
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # of weights; None: float32 on a CPU, else bfloat16
    quantise: Literal["none", "int8", "int4"] = "none"  # keep the base's layers in 8 or 4 bits
    trained_bytes: int = 4  # of a trained number, its gradient and each moment; lorakit takes 4, the LoRA paper 2
    labels: int = 2  # classes of the head that a model without a language model's gets

    def __post_init__(self) -> None:
        check("plan for", counts(trained_bytes=self.trained_bytes, labels=self.labels))


def answer(question: Question) -> Forecast:
    """The forecast of a run.

    Raises:
        UnknownName: no such model or machine.
        BadModel: a config that no model can be built from, or one of an encoder with a decoder.
        NoSuchTarget, BadMethod: the method does not fit the model.
    """
    dtype = getattr(torch, question.dtype) if question.dtype else usual_dtype(question.machine)
    where = machine(question.machine, dtype)
    model = without_values(question.base, dtype, question.labels)
    require_one_stack(model)
    if question.quantise != "none":
        models.quantise(model, question.quantise)
    method = with_head(model, question.method)
    return plan(model, method, question.train, question.tokens, where, trained_bytes=question.trained_bytes)


def has_weights(base: str) -> bool:
    """Whether the base can be trained: a config alone, or a shape by its name, has nothing to begin with.

    >>> has_weights("smollm2-135m"), has_weights("gpt3-175b")
    (True, False)
    """
    return base not in SHAPES and Path(base).name != CONFIG


def without_values(base: str, dtype: torch.dtype, labels: int = 2) -> Any:
    """A model on the meta device, from its config alone; with a classification head where it writes no text.

    >>> sum(p.numel() for p in without_values("gpt3-175b", torch.float16).parameters())
    175221817344
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config, writes = _config(base)
    if not writes:
        config.num_labels = labels
    kind = AutoModelForCausalLM if writes else AutoModelForSequenceClassification
    with _reading(base), quiet(), torch.device("meta"):
        return kind.from_config(config, dtype=dtype, trust_remote_code=False)


def _config(base: str) -> tuple[Any, bool]:
    """The config, and whether the model writes text."""
    from transformers import AutoConfig

    if base in SHAPES:
        return AutoConfig.for_model(**SHAPES[base]), True
    path = Path(base).expanduser()
    place = str(path.parent) if path.name == CONFIG else base
    with _reading(base):
        writes = models.writes(place)
        is_here = Path(place).expanduser().exists() or place.replace("_", "-") in registry.names(PACKAGED)
        return AutoConfig.from_pretrained(models.folder(place) if is_here else place, trust_remote_code=False), writes


@contextmanager
def _reading(base: str) -> Iterator[None]:
    try:
        yield
    except UnknownName as error:
        raise UnknownName(f"{error}; a plan can also be made for {', '.join(SHAPES)}") from error
    except LorakitError:
        raise
    except Exception as error:  # a config can be wrong in as many ways as there are models
        raise BadModel(f"no model can be built from the config of {base}: {' '.join(str(error).split())}") from error

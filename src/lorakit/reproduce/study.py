"""Gather what a report is about: adapters in any format, or changed models, their base, and what they do on text."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lorakit as lk
from lorakit import interop, models
from lorakit.analyse.alike import alike
from lorakit.analyse.difference import Difference, difference
from lorakit.analyse.divergence import has_writer
from lorakit.analyse.effect import effect
from lorakit.analyse.examples import disagreements
from lorakit.analyse.study import Study
from lorakit.core.exchange import Exchange
from lorakit.data import Dataset, Example
from lorakit.data.tokens import encode
from lorakit.errors import BadAdapterFile, BadModel, LorakitError
from lorakit.evaluate import compare
from lorakit.interop.checkpoint import skeleton, weights
from lorakit.reproduce.measures import Evaluate, mean_loss, measure

CONFIG = "config.json"  # of a whole model
Watch = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What to study."""

    adapters: Sequence[str]  # adapters in any format, or folders of models that were changed
    base: str | None = None  # their base's name, folder or GGUF file
    alpha: float | None = None  # where files do not say
    rank: int = 64  # directions kept of each matrix of a changed model
    examples: Sequence[Example] = field(default_factory=tuple)  # texts on which the adapters are compared with the base


def gather(asked: Asked, *, watch: Watch = lambda what: None) -> Study:
    """Read what there is; nothing of the base is read that no question needs.

    Raises:
        LorakitError: something that cannot be read, or texts without a base.
    """
    if asked.examples and asked.base is None:
        raise LorakitError("what an adapter does on text needs its base; name it with --base")
    places = dict(zip(labels(asked.adapters), map(Path, asked.adapters), strict=True))
    folder = None if asked.base is None else models.folder(asked.base)
    adapters, lost = {}, {}
    for name, place in places.items():
        watch(f"reading {name}")
        if not (place / CONFIG).is_file():
            adapters[name] = interop.read(place, interop.Told(alpha=asked.alpha, base=asked.base))
        elif folder is None:
            raise BadAdapterFile(place, ["it is a whole model; name the base that it was made from with --base"])
        else:
            found = _difference(place, folder, asked)
            adapters[name], lost[name] = found.exchange, found.left_out
    adapters = alike(adapters)
    own = {} if folder is None else weights(folder, _architecture(adapters))
    study = Study(adapters, own, lost=lost)
    if not asked.examples or asked.base is None:
        return study
    return _on_text(study, asked.base, asked.examples, watch)


def labels(places: Sequence[str]) -> list[str]:
    """Short names of paths: the last folder, with as much of the path as tells them apart.

    >>> labels(["out/reviews", "out/e2e"]), labels(["a/x", "b/x"])
    (['reviews', 'e2e'], ['a/x', 'b/x'])
    """
    parts = [Path(place).resolve().parts for place in places]
    for length in range(1, max(map(len, parts), default=1) + 1):
        short = ["/".join(each[-length:]) for each in parts]
        if len(set(short)) == len(short):
            return short
    raise LorakitError(f"{places[0]} is named twice; an adapter is compared with others")


def _difference(place: Path, base: Path, asked: Asked) -> Difference:
    embeddings = [path for path, module in skeleton(base, {}).named_modules() if isinstance(module, nn.Embedding)]
    return difference(weights(base), weights(place), asked.rank, asked.base, embeddings)


def _architecture(adapters: Mapping[str, Exchange]) -> str | None:
    """The class of model that an adapter says it was trained on, by which the base's layers are called."""
    told = [_trained_on(exchange).get("architecture") for exchange in adapters.values()]
    return next(filter(None, told), None)


def _on_text(study: Study, base: str, examples: Sequence[Example], watch: Watch) -> Study:
    model, tokenizer = models.load(base, labels=_classes(study.adapters))
    if getattr(model.config, "is_encoder_decoder", False):
        raise BadModel(f"{base} reads by an encoder and writes by a decoder, which is not compared on text; leave the "
                       "texts out with --examples 0")  # fmt: skip
    effects, differing, writes = {}, {}, has_writer(model) and models.writes(base)
    for name, exchange in study.adapters.items():
        watch(f"reading text with {name}")
        with _loadable(exchange) as folder:
            lk.load(model, folder, name, active=False)
        effects[name] = effect(model, name, _batches(examples, tokenizer))
        differing[name] = disagreements(model, tokenizer, name, examples) if writes else []
        lk.detach(model, name)
    return replace(study, effects=effects, disagreements=differing,
                   token=lambda token: repr(tokenizer.decode([token])))  # fmt: skip


@contextmanager
def _loadable(exchange: Exchange) -> Iterator[Path]:
    """The adapter as a folder that can be loaded, for as long as it takes; that its base is not verified is no news."""
    log = logging.getLogger("lorakit")
    level = log.level
    with tempfile.TemporaryDirectory() as temporary:
        interop.write(exchange, Path(temporary) / "adapter", "peft")
        log.setLevel(logging.ERROR)
        try:
            yield Path(temporary) / "adapter"
        finally:
            log.setLevel(level)


def _batches(examples: Sequence[Example], tokenizer: Any) -> Iterator[dict[str, Any]]:
    for each in encode(examples, tokenizer, 512, with_eos=False):
        ids_1T = torch.tensor([each.ids])
        yield {"input_ids": ids_1T, "attention_mask": torch.ones_like(ids_1T)}


def losses(
    base: str, adapters: Mapping[str, Exchange], data: Dataset, settings: Evaluate
) -> dict[str, dict[str, float]]:
    """Mean loss on the test examples, and the measures that fit them, under each adapter and the bare base.

    Raises:
        BadData: there are no test examples.
    """
    model, tokenizer = models.load(base, labels=_classes(adapters))
    encoded = encode(data.test, tokenizer, settings.max_length)
    sides: dict[str, str | None] = {"base": None}
    for name, exchange in adapters.items():
        with _loadable(exchange) as folder:
            sides[name] = lk.load(model, folder, name, active=False)

    def told() -> dict[str, float]:
        loss = mean_loss(model, encoded, tokenizer.pad_token_id, settings.batch_size)
        return {"loss": loss} | measure(model, tokenizer, data, settings)

    return compare(model, sides, told)


def _classes(adapters: Mapping[str, Exchange]) -> int | None:
    """How many labels the adapters' heads tell apart; None where they have none."""
    told = [_trained_on(exchange).get("labels") for exchange in adapters.values()]
    return next((count for count in told if count), None)


def _trained_on(exchange: Exchange) -> Mapping[str, Any]:
    """What lorakit's header tells of the base; nothing where another tool wrote the file."""
    told = (exchange.header or {}).get("base")
    return told if isinstance(told, Mapping) else {}

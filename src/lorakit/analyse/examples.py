"""Where a base and an adapter disagree, example by example: the tokens at which their predictions part.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakit.analyse.divergence import divergence, has_writer
from lorakit.core.insertion import contexts
from lorakit.core.mode import mode
from lorakit.core.routing import use
from lorakit.core.sites import family_of
from lorakit.data.examples import Example
from lorakit.data.tokens import Encoded, encode
from lorakit.errors import BadData, BadModel
from lorakit.models import longest


@dataclass(frozen=True)
class Prediction:
    """How probable a next token is to the base and to the adapter."""

    token: str
    before: float
    after: float


@dataclass(frozen=True)
class Place:
    """What is predicted after a token of the text."""

    position: int  # of the token in the text, from 0
    token: str
    divergence: float  # D(adapter ‖ base) of the next token, in nats
    actual: Prediction | None  # the token that follows in the text, if one does
    predictions: tuple[Prediction, ...]  # those whose probability changed most, by how much


@dataclass(frozen=True)
class Disagreement:
    """One text, read by the base and by the adapter."""

    example: Example
    tokens: tuple[str, ...]
    divergences: tuple[float, ...]  # after each token
    places: tuple[Place, ...]  # the most divergent, these first
    target: tuple[float, float] | None  # ln p of the whole target, before and after; None without a target

    @property
    def mean(self) -> float:
        """The mean divergence of its tokens."""
        return sum(self.divergences) / len(self.divergences)


def disagreements(
    model: Any,
    tokenizer: Any,
    name: str,
    examples: Sequence[Example],
    *,
    most: int = 5,
    max_length: int = 512,
) -> list[Disagreement]:
    """How each text is read with and without an attached adapter, those with the greatest mean divergence first.

    Texts are read one by one; `most` is the number of places told of each, and of predictions told of each place. A
    target may be empty.

    Raises:
        NoSuchAdapter: no adapter of that name.
        BadModel: the model is no causal language model.
        BadData: there is no text, or an empty one.

    Example:
        ```python
        for found in disagreements(model, tokenizer, "reviews", [Example("A fine film, so it is", " good")]):
            print(found.mean, [(place.token, place.predictions[0]) for place in found.places])
        ```
    """
    if (why := _not_causal(model)) is not None:
        raise BadModel(f"{type(model).__name__} {why}, so it predicts no next tokens of a text; lorakit.analyse.effect "
                       "tells how far an adapter moves its layers")  # fmt: skip
    if not examples or any(not example.context + example.target for example in examples):
        raise BadData("predictions are compared on texts, and there is none, or an empty one; leave it out")
    encoded = encode(examples, tokenizer, min(max_length, longest(model)), with_eos=False)
    found = []
    with mode(model, training=False), torch.no_grad():
        for example, each in zip(examples, encoded, strict=True):
            before_TV, after_TV = (_log_probabilities(model, what, each) for what in (None, name))
            found.append(_disagreement(example, each, before_TV, after_TV, tokenizer, most))
    return sorted(found, key=lambda each: -each.mean)


def _not_causal(model: Any) -> str | None:
    """Why a model does not predict the next token from those before it; None if it does."""
    if not has_writer(model):
        return "has no language-model head"
    if model.config.is_encoder_decoder:
        return "writes by a decoder what an encoder has read"
    return "sees the tokens on both sides" if family_of(model).bidirectional else None


def _log_probabilities(model: Any, what: str | None, encoded: Encoded) -> Tensor:
    ids_1T = torch.tensor([encoded.ids], device=model.device)
    with use(model, what), contexts(model, torch.tensor([encoded.start])):
        logits_1TV = model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), use_cache=False).logits
    return logits_1TV[0].float().log_softmax(-1).cpu()


def _disagreement(
    example: Example, encoded: Encoded, before_TV: Tensor, after_TV: Tensor, tokenizer: Any, most: int
) -> Disagreement:
    divergence_T = divergence(before_TV, after_TV)
    tokens = tuple(tokenizer.decode([token]) for token in encoded.ids)

    def prediction(position: int, token: int) -> Prediction:
        before, after = (float(each[position, token].exp()) for each in (before_TV, after_TV))
        return Prediction(tokenizer.decode([token]), before, after)

    def place(position: int) -> Place:
        change_V = (after_TV[position].exp() - before_TV[position].exp()).abs()
        moved = change_V.topk(min(most, len(change_V))).indices.tolist()
        after = encoded.ids[position + 1 : position + 2]
        return Place(
            position,
            tokens[position],
            float(divergence_T[position]),
            prediction(position, after[0]) if after else None,
            tuple(prediction(position, token) for token in moved),
        )

    target = None
    if example.target:
        at, wanted = torch.arange(encoded.start, len(encoded.ids)) - 1, torch.tensor(encoded.ids[encoded.start :])
        target = float(before_TV[at, wanted].sum()), float(after_TV[at, wanted].sum())
    places = divergence_T.topk(min(most, len(tokens))).indices.tolist()
    return Disagreement(example, tokens, tuple(divergence_T.tolist()), tuple(map(place, places)), target)

"""Examples as token ids: context and target tokenised together, cut to a length so that the target stays."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.data.examples import Example
from lorakit.errors import BadData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AT_ONCE = 1024  # examples tokenised in one call

log = logging.getLogger(__name__)


class TooShort(BadData):
    """A length at which nothing is left to learn from; `least` would do."""

    def __init__(self, message: str, least: int) -> None:
        self.least = least
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one example; those from `start` on are its target."""

    ids: tuple[int, ...]
    start: int  # at least 1: nothing comes before the first token to predict it from
    label: int | None = None
    cut_context: int = 0  # tokens that the length limit took, on the left
    cut_target: int = 0  # and on the right


def encode(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, *, with_eos: bool = True
) -> list[Encoded]:
    """Tokenise context and target together; the first token that reaches into the target belongs to it.

    The target ends in EOS. Where both are too long the context is cut on the left, and only then the target on the
    right; one token stays before the target, to predict it from. What was cut is counted and logged.

    Raises:
        TooShort: not one target fits whole.
        BadData: the tokenizer cannot say which token comes from which text.
    """
    eos = [tokenizer.eos_token_id] if with_eos else []
    if not tokenizer.is_fast or None in eos:
        lacks = "no end-of-text token" if tokenizer.is_fast else "no offsets of its tokens"
        raise BadData(f"the tokenizer {tokenizer.name_or_path!r} has {lacks}; choose a model whose tokenizer has them")
    first = _first(tokenizer)
    found = []
    for ids, boundary, label in _parts(examples, tokenizer):
        context = [*first, *ids[:boundary]] if ids[:1] != first else ids[:boundary]
        found.append(_fitted(context, [*ids[boundary:], *eos], len(first), max_length, label))
    _report(found, max_length)
    return found


def encode_texts(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Encoded]:
    """Tokenise contexts for a classifier, with the special tokens that it was pretrained with; nothing is a target.

    Raises:
        TooShort: no token of a text fits.
        BadData: an example has no label.
    """
    _refuse_no_text(max_length, tokenizer.num_special_tokens_to_add())
    found = []
    for start in range(0, len(examples), AT_ONCE):
        batch = examples[start : start + AT_ONCE]
        if any(example.label is None for example in batch):
            raise BadData("a classifier needs labels; name the label column of the data with label")
        texts = [example.context for example in batch]
        whole = tokenizer(texts, verbose=False)["input_ids"]
        cut = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        for example, short, full in zip(batch, cut, whole, strict=True):
            found.append(Encoded(tuple(short), len(short), example.label, cut_context=len(full) - len(short)))
    _log_cuts(found, max_length)
    return found


def _first(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that the tokenizer puts before every text, if it does."""
    alone = tokenizer("")["input_ids"]
    return [tokenizer.bos_token_id] if alone and alone[0] == tokenizer.bos_token_id else []


def _parts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], int, int | None]]:
    """Token ids of each example, how many of them are context, and its label."""
    for start in range(0, len(examples), AT_ONCE):
        batch = examples[start : start + AT_ONCE]
        texts = [example.context + example.target for example in batch]
        tokens = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for example, ids, offsets in zip(batch, tokens["input_ids"], tokens["offset_mapping"], strict=True):
            boundary = len(example.context)
            in_target = (number for number, (_, end) in enumerate(offsets) if end > boundary)
            yield ids, next(in_target, len(ids)), example.label


def _fitted(context: list[int], target: list[int], fixed: int, max_length: int, label: int | None) -> Encoded:
    """Cut to `max_length`; the first `fixed` tokens of the context stay."""
    kept_target = target[: max_length - 1] if context else target[:max_length]
    room = max(max_length - fixed - len(kept_target), 0)
    loose = context[fixed:]
    kept_context = context[:fixed] + loose[max(len(loose) - room, 0) :]
    return Encoded(
        (*kept_context, *kept_target),
        max(len(kept_context), 1),
        label,
        cut_context=len(context) - len(kept_context),
        cut_target=len(target) - len(kept_target),
    )


def _refuse_no_text(max_length: int, special: int) -> None:
    if max_length <= special:
        told = f"max_length={max_length} leaves no token of text beside the special tokens ({special})"
        raise TooShort(f"{told}; allow {special + 1} or more", special + 1)


def _report(found: list[Encoded], max_length: int) -> None:
    if found and all(example.cut_target for example in found):
        shortest = min(len(example.ids) - example.start + example.cut_target for example in found)
        raise TooShort(
            f"every target is cut off by max_length={max_length}: the shortest has {shortest} tokens; "
            "allow more than that, or shorten the targets",
            shortest + 1,
        )
    _log_cuts(found, max_length)


def _log_cuts(found: list[Encoded], max_length: int) -> None:
    contexts = sum(example.cut_context > 0 for example in found)
    targets = sum(example.cut_target > 0 for example in found)
    if contexts or targets:
        log.warning(
            "max_length=%d cuts %d contexts and %d targets of %d examples", max_length, contexts, targets, len(found)
        )

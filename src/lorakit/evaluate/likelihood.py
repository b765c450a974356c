"""How likely a causal model finds given texts: accuracy by the likelihood of the label words, and perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorakit.data.examples import Example
from lorakit.data.tokens import Encoded, encode
from lorakit.errors import BadData
from lorakit.evaluate import metrics
from lorakit.evaluate.scores import Request, log_probabilities
from lorakit.models import longest


def label_accuracy(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    labels: Sequence[str],
    *,
    batch_size: int = 32,
    max_length: int = 512,
) -> float:
    """The share of examples whose own label is the likeliest of the label words, each scored as a whole target.

    `labels` are the words in the order of their numbers, with or without the space that the targets begin with.

    Raises:
        BadData: an example has no label number, or its target is not its label's word.
    """
    wanted = [example.label for example in examples]
    contexts = [example.context for example in examples]
    written = _as_targets(examples, labels)
    scores_NL = label_scores(model, tokenizer, contexts, written, batch_size=batch_size, max_length=max_length)
    return metrics.accuracy(scores_NL.argmax(1).tolist(), wanted)


def label_scores(
    model: Any,
    tokenizer: Any,
    contexts: Sequence[str],
    labels: Sequence[str],
    *,
    batch_size: int = 32,
    max_length: int = 512,
) -> Tensor:
    """The summed log-probability of each whole label after each context: (contexts, labels), float64 on the CPU.

    Labels that share their input share its forward pass: one pass a context when every label is one token.
    """
    pairs = [Example(context, label) for context in contexts for label in labels]
    encoded = encode(pairs, tokenizer, min(max_length, longest(model)), with_eos=False)
    requests, owners = _shared([encoded[i : i + len(labels)] for i in range(0, len(pairs), len(labels))])
    scores = torch.zeros(len(pairs), dtype=torch.float64)
    for owned, values in zip(owners, log_probabilities(model, requests, batch_size), strict=True):
        for owner, value in zip(owned, values, strict=True):
            scores[owner] += value
    return scores.view(len(contexts), len(labels))


def perplexity(
    model: Any, tokenizer: Any, examples: Sequence[Example], *, batch_size: int = 8, max_length: int = 512
) -> float:
    """The exponential of the mean negative log-likelihood of the target tokens, the end of the text among them."""
    requests = [_request(encoded) for encoded in encode(examples, tokenizer, min(max_length, longest(model)))]
    found = log_probabilities(model, requests, batch_size)
    return metrics.perplexity([value for values in found for value in values])


def _as_targets(examples: Sequence[Example], labels: Sequence[str]) -> list[str]:
    """The label words as the examples' targets write them."""
    if not examples or not all(example.label in range(len(labels)) for example in examples):
        raise BadData(f"accuracy by label words needs examples, each with the number of one of the {len(labels)} words "
                      f"({', '.join(labels)}); give a label column")  # fmt: skip
    first = examples[0].target
    written = [first[: len(first) - len(first.lstrip())] + label.strip() for label in labels]
    for example in examples:
        if example.label is not None and example.target != written[example.label]:
            raise BadData(f"an example of label {example.label} has the target {example.target!r}, which is not the "
                          f"label's word {written[example.label]!r}; give the label words as targets")  # fmt: skip
    return written


def _request(encoded: Encoded) -> Request:
    positions = range(max(encoded.start, 1) - 1, len(encoded.ids) - 1)
    tokens = tuple(encoded.ids[position + 1] for position in positions)
    return Request(tuple(encoded.ids[:-1]), tuple(positions), tokens)


def _shared(groups: Sequence[Sequence[Encoded]]) -> tuple[list[Request], list[list[int]]]:
    """One request for all texts of a group whose input begins another's; beside it, the text of each of its tokens.

    A causal model's log-probability at a position does not depend on what comes later, so the sharing is exact.
    """
    requests: list[Request] = []
    owners: list[list[int]] = []
    first = 0
    for group in groups:
        apart: dict[tuple[int, ...], list[tuple[int, Request]]] = {}
        for number, encoded in sorted(enumerate(group, first), key=lambda entry: -len(entry[1].ids)):
            request = _request(encoded)
            longer = (ids for ids in apart if ids[: len(request.ids)] == request.ids)
            apart.setdefault(next(longer, request.ids), []).append((number, request))
        for ids, members in apart.items():
            positions = tuple(position for _, request in members for position in request.positions)
            tokens = tuple(token for _, request in members for token in request.tokens)
            requests.append(Request(ids, positions, tokens))
            owners.append([number for number, request in members for _ in request.tokens])
        first += len(group)
    return requests, owners

"""Where base and adapter disagree, text by text, against whole log-probabilities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM

import lorakit as lk
from lorakit.analyse.examples import Disagreement, disagreements
from lorakit.core.routing import use
from lorakit.data.examples import Example
from lorakit.errors import BadData, BadModel, NoSuchAdapter
from tests.data.conftest import made
from tests.tiny import tiny

READER = made()
EXAMPLES = [
    Example("Review: a fine film\nSentiment:", " positive"),
    Example("the film is bad .", ""),
    Example("", "good"),
    Example("Review: é\nSentiment:", " negative"),
]


def adapted(family: str = "llama", method: Any = None) -> Any:
    model = tiny(family, vocab_size=330)
    lk.attach(model, method or lk.LoRA(rank=2, targets=("attention",)), name="a")
    torch.manual_seed(1)
    for parameter in lk.parameters(model):
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def logs(model: Any, what: str | None, example: Example) -> Tensor:
    ids = READER(example.context + example.target, return_tensors="pt")["input_ids"]
    with use(model, what):
        return model(ids).logits[0].double().log_softmax(-1)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_number_is_that_of_the_two_models(family: str) -> None:
    model = adapted(family)
    for found in disagreements(model, READER, "a", EXAMPLES, most=4):
        text = found.example.context + found.example.target
        ids, before, after = READER(text)["input_ids"], *(logs(model, what, found.example) for what in (None, "a"))
        divergence = (after.exp() * (after - before)).sum(-1)
        assert found.tokens == tuple(READER.decode([token]) for token in ids)
        assert found.divergences == pytest.approx(divergence.tolist(), rel=1e-3, abs=1e-6)
        assert found.mean == pytest.approx(float(divergence.mean()), rel=1e-3)
        for place in found.places:
            row = place.position
            assert (place.token, place.divergence) == (found.tokens[row], found.divergences[row])
            change = (after[row].exp() - before[row].exp()).abs()
            assert len(place.predictions) == 4
            for number, each in enumerate(place.predictions):
                token = int(change.topk(4).indices[number])
                wanted = READER.decode([token]), float(before[row, token].exp()), float(after[row, token].exp())
                assert (each.token, each.before, each.after) == (
                    wanted[0],
                    *(pytest.approx(p, rel=1e-4) for p in wanted[1:]),
                )
            if row + 1 == len(ids):
                assert place.actual is None
            else:
                assert place.actual is not None and place.actual.token == found.tokens[row + 1]
                assert place.actual.after == pytest.approx(float(after[row, ids[row + 1]].exp()), rel=1e-4)
        _check_target(found, ids, before, after)


def _check_target(found: Disagreement, ids: list[int], before: Tensor, after: Tensor) -> None:
    start = max(len(READER(found.example.context)["input_ids"]), 1)
    if not found.example.target:
        assert found.target is None
    else:
        wanted = [sum(float(each[row - 1, ids[row]]) for row in range(start, len(ids))) for each in (before, after)]
        assert found.target == pytest.approx(wanted, rel=1e-4)


def test_the_greatest_disagreements_come_first() -> None:
    found = disagreements(adapted(), READER, "a", EXAMPLES, most=3)
    assert [each.mean for each in found] == sorted((each.mean for each in found), reverse=True)
    assert {each.example for each in found} == set(EXAMPLES)
    for each in found:
        told = [place.divergence for place in each.places]
        assert told == sorted(each.divergences, reverse=True)[:3]


def test_a_fresh_adapter_agrees_and_the_model_is_as_it_was() -> None:
    model = tiny("llama", vocab_size=330).train()
    lk.attach(model, lk.LoRA(rank=2), name="a", active=False)
    found = disagreements(model, READER, "a", EXAMPLES)
    assert not any(sum(each.divergences) for each in found)
    assert all(each.target is None or each.target[0] == each.target[1] for each in found)
    assert model.training


def test_a_prefix_is_compared_by_what_it_predicts() -> None:
    model = adapted(method=lk.PrefixEmbedding(prefix=2, infix=1))
    (found,) = disagreements(model, READER, "a", EXAMPLES[:1])
    assert len(found.divergences) == len(found.tokens) and found.mean > 1e-3


def test_long_texts_are_cut_to_what_the_model_reads() -> None:
    model = adapted()
    (found,) = disagreements(model, READER, "a", [Example("bad " * 200, " good")])
    (short,) = disagreements(model, READER, "a", [Example("bad " * 200, " good")], max_length=10)
    assert (len(found.tokens), len(short.tokens)) == (64, 10)
    assert found.tokens[-1] == short.tokens[-1] == READER.decode([READER(" good")["input_ids"][-1]])


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(BadModel, match="no language-model head"):
        disagreements(adapted("bert"), READER, "a", EXAMPLES)
    with pytest.raises(BadModel, match="T5ForConditionalGeneration writes by a decoder"):
        disagreements(adapted("t5"), READER, "a", EXAMPLES)
    with pytest.raises(BadModel, match="sees the tokens on both sides"):
        disagreements(AutoModelForMaskedLM.from_config(adapted("bert").config), READER, "a", EXAMPLES)
    with pytest.raises(NoSuchAdapter, match="'b'"):
        disagreements(adapted(), READER, "b", EXAMPLES)
    for examples in ([], [Example("", "")]):
        with pytest.raises(BadData, match="there is none, or an empty one"):
            disagreements(adapted(), READER, "a", examples)

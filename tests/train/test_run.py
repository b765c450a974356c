from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch.nn import functional as F

import lorakit as lk
from lorakit import train
from lorakit.core.state import adapter_tensors, state_of
from lorakit.errors import BadData, BadMethod, BadModel, BadState, LorakitError, NeverActed
from lorakit.train import Train
from lorakit.train.settings import learning_rate
from tests.tiny import tiny
from tests.train.small import Encoded, adapted, collate, examples, feed, order

SETTINGS = Train(steps=4, batch_size=4, learning_rate=1e-2)


def trained(model: Any, settings: Train = SETTINGS, encoded: list[Encoded] | None = None, **kwargs: Any) -> list[Any]:
    return list(train.run(model, feed(encoded), settings, name="a", **kwargs))


def values(model: Any) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in adapter_tensors(model, "a").values()])


def close(one: Any, other: Any) -> bool:
    return torch.allclose(values(one), values(other), rtol=1e-4, atol=1e-6)


def by_hand(model: Any, settings: Train, steps: int) -> None:
    """The same training as a plain PyTorch loop over whole logits."""
    parameters = lk.parameters(model, "a")
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.999), weight_decay=settings.weight_decay)
    encoded = examples()
    epochs = (order([len(e.ids) for e in encoded], settings.batch_size, settings.seed, n) for n in itertools.count())
    batches = itertools.chain.from_iterable(epochs)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, settings)
        losses, labelled = torch.zeros(()), 0
        for numbers in itertools.islice(batches, settings.accumulate):
            batch = collate([encoded[number] for number in numbers], 0)
            logits = model(input_ids=batch.ids_BT, attention_mask=batch.attention_BT).logits[:, :-1]
            wanted = batch.labels_BT[:, 1:]
            losses = losses + F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")
            labelled += int((wanted != -100).sum())
        (losses / labelled).backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_it_trains_as_a_plain_loop_does(family: str) -> None:
    settings = Train(steps=5, batch_size=3, accumulate=2, learning_rate=1e-2, weight_decay=0.1, clip_norm=0.5)
    model, wanted = adapted(family, dropout=0.0), adapted(family, dropout=0.0)
    steps = trained(model, settings)
    by_hand(wanted, settings, 5)
    assert close(model, wanted)
    assert any(step.gradient_norm > 0.5 for step in steps)


def test_only_the_adapter_trains_and_the_loss_falls() -> None:
    model = adapted()
    lk.attach(model, lk.LoRA(rank=2, targets=("attn.q",)), name="other")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    steps = trained(model, Train(steps=40, batch_size=20, learning_rate=2e-2))
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert len(changed) == len(adapter_tensors(model, "a"))
    assert all(".adapters.a." in key for key in changed)
    assert steps[-1].loss < 0.8 * steps[0].loss
    assert all(parameter.grad is None for parameter in model.parameters())


def test_accumulation_is_one_larger_batch() -> None:
    one, other = adapted(dropout=0.0), adapted(dropout=0.0)
    trained(one, replace(SETTINGS, batch_size=4))
    trained(other, replace(SETTINGS, batch_size=2, accumulate=2))
    assert close(one, other)


def test_epochs_and_seeds_decide_the_steps() -> None:
    assert len(trained(adapted(), Train(epochs=1.5, batch_size=4, accumulate=2))) == 4  # 20 examples
    one, same, other = adapted(), adapted(), adapted()
    trained(one), trained(same), trained(other, replace(SETTINGS, seed=1))
    assert torch.equal(values(one), values(same))
    assert not torch.equal(values(one), values(other))


@pytest.mark.parametrize("closed", [False, True])
def test_the_model_and_the_random_state_are_the_callers_between_steps_and_after(closed: bool) -> None:
    model = adapted()
    lk.attach(model, lk.LoRA(rank=2), name="other")
    model.lm_head.train()
    draws = random.getstate(), torch.get_rng_state(), str(numpy.random.get_state())
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    steps = train.run(model, feed(), SETTINGS, name="a")

    def untouched() -> bool:
        return (
            modes == [module.training for module in model.modules()]
            and flags == [parameter.requires_grad for parameter in model.parameters()]
            and state_of(model).routing.names == ("other",)  # type: ignore[union-attr]
            and draws[0] == random.getstate()
            and torch.equal(draws[1], torch.get_rng_state())
            and draws[2] == str(numpy.random.get_state())
        )

    for _ in steps:
        assert untouched()
        if closed:
            steps.close()
    assert untouched()


def test_what_an_evaluation_does_changes_no_step() -> None:
    def evaluate() -> dict[str, float]:
        watched.train()
        torch.manual_seed(99)
        return {"drawn": torch.rand(()).item()}

    plain, watched = adapted(), adapted()
    trained(plain)
    steps = trained(watched, replace(SETTINGS, evaluate_every=3), evaluate=evaluate)
    assert torch.equal(values(plain), values(watched))
    assert [step.step for step in steps if step.evaluation] == [3, 4]


def test_gradient_checkpointing_trains_the_same() -> None:
    plain, checkpointed = adapted(), adapted()
    checkpointed.gradient_checkpointing_enable()
    trained(plain), trained(checkpointed)
    assert close(plain, checkpointed)


def test_training_reads_no_cache() -> None:
    model = adapted()
    asked = []
    model.model.register_forward_pre_hook(lambda m, args, kwargs: asked.append(kwargs["use_cache"]), with_kwargs=True)
    trained(model)
    assert asked and not any(asked)


@pytest.mark.parametrize(("family", "head"), [("bert", "classifier"), ("roberta", "classifier"), ("gpt2", "score")])
def test_a_classifier_learns_its_classes_with_its_head(family: str, head: str) -> None:
    model = tiny(family, labels=3)
    lk.attach(model, lk.LoRA(rank=2), name="headless")
    with pytest.raises(BadMethod, match=head):
        list(train.run(model, feed(examples(labels=3)), SETTINGS, name="headless"))
    lk.attach(model, lk.LoRA(rank=2, train=(head,)), name="a")
    steps = trained(model, Train(steps=40, batch_size=20, learning_rate=2e-2), examples(labels=3))
    assert steps[-1].loss < 0.7 * steps[0].loss


def test_a_step_counts_what_the_model_read() -> None:
    (step,) = trained(adapted(), Train(steps=1, batch_size=20))
    assert step.tokens == sum(len(example.ids) for example in examples())
    assert step.tokens_per_second == pytest.approx(step.tokens / step.seconds)
    assert (step.step, step.steps, step.evaluation) == (1, 1, None)


def test_a_batch_without_a_labelled_token_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    unlabelled = [Encoded((3, 4, 5), 3)] * 4
    with pytest.raises(BadData, match=r"examples .* without a labelled token"):
        trained(adapted(), encoded=unlabelled, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(BadData, match="nothing to train on"):
        feed([])


def test_a_model_without_a_head_is_refused() -> None:
    model = tiny("bert")
    lk.attach(model, lk.LoRA(rank=2), name="a")
    with pytest.raises(BadModel, match="labels=n"):
        trained(model)


def test_a_frozen_adapter_is_refused() -> None:
    model = adapted()
    for parameter in lk.parameters(model, "a"):
        parameter.requires_grad_(False)
    with pytest.raises(BadState, match="no trainable parameter"):
        train.run(model, feed(), SETTINGS, name="a")


def test_a_delta_that_never_acts_is_refused_after_the_first_step() -> None:
    model = adapted()
    skipped = model.model.layers[1]
    model.model.layers[1].forward = lambda hidden_states, **kwargs: hidden_states
    before = values(model).clone()
    with pytest.raises(NeverActed, match=r"layers\.1\.self_attn\.q_proj"):
        trained(model)
    assert skipped is model.model.layers[1] and torch.equal(values(model), before)


def test_a_loss_that_is_no_number_changes_nothing() -> None:
    model = adapted()
    model.model.norm.weight.data[0] = float("nan")
    before = values(model).clone()
    with pytest.raises(LorakitError, match="step 1 has a loss of nan"):
        trained(model)
    assert torch.equal(values(model), before)


def test_bad_settings_are_all_named() -> None:
    with pytest.raises(LorakitError, match=r"steps=0 .*learning_rate=-1.*accumulate=0.*clip_norm=-2"):
        Train(steps=0, learning_rate=-1, accumulate=0, clip_norm=-2)
    with pytest.raises(LorakitError, match=r"epochs=inf .*learning_rate=nan .*seed=-1 "):
        Train(epochs=float("inf"), learning_rate=float("nan"), seed=-1)
    with pytest.raises(LorakitError, match="compile=True must be False where checkpointing is blocks"):
        Train(compile=True, checkpointing="blocks")


def test_the_learning_rate_rises_to_its_peak_and_falls_towards_zero() -> None:
    for share in (0.0, 0.06, 0.5, 1.0):
        settings = Train(learning_rate=1.0, warmup_share=share)
        rates = [learning_rate(step, 50, settings) for step in range(1, 51)]
        peak = rates.index(max(rates))
        assert max(rates) == 1.0 and min(rates) > 0
        assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)

"""Every method trains through the same loop, resumes to the same bits, and is followed in the Trainer."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import lorakit as lk
from lorakit import train
from lorakit.core.state import adapter_buffers, adapter_tensors
from lorakit.core.stepping import after_step, before_step, penalty
from lorakit.errors import BadMethod, LorakitError
from lorakit.train.callback import FollowMethod
from tests.laws.cases import METHODS, output, scramble
from tests.tiny import tiny, tokens
from tests.train.small import SETTINGS, examples, feed

every_method = pytest.mark.parametrize("method", METHODS)


def model_with(method: str, family: str = "gpt2", **fields: Any) -> Any:
    torch.manual_seed(1)
    model = tiny(family, **fields)
    lk.attach(model, METHODS[method], name="a")
    return model


def trained(method: str, out: Path, *, stop_after: int = 99, resume: bool = False, **changes: Any) -> Any:
    model = model_with(method)
    settings = replace(SETTINGS, **changes)
    steps = train.run(model, feed(), settings, name="a", out=out, resume=resume)
    for step in steps:
        if step.step == stop_after:
            steps.close()
    return model


def numbers(model: Any) -> dict[str, torch.Tensor]:
    found = adapter_tensors(model, "a") | adapter_buffers(model, "a")
    return {key: value.detach().clone() for key, value in found.items()}


@every_method
def test_a_resumed_run_has_the_same_bits(method: str, tmp_path: Path) -> None:
    whole = numbers(trained(method, tmp_path / "whole"))
    trained(method, tmp_path / "cut", stop_after=6)
    again = numbers(trained(method, tmp_path / "cut", resume=True))
    assert whole.keys() == again.keys()
    assert [key for key in whole if not torch.equal(whole[key], again[key])] == []
    fresh = numbers(model_with(method))
    assert any(not torch.equal(whole[key], fresh[key]) for key in fresh)


DRAWING = {
    "dylora": lk.DyLoRA(),
    "dropped": lk.Bottleneck.dropped(drop=0, drop_most=1, seed=1),
    "combine": lk.combine("bitfit", lk.DyLoRA()),
}


def drawing(method: str) -> Any:
    model = tiny("gpt2")
    lk.attach(model, DRAWING[method], name="a")
    scramble(model, "a")
    return model


def in_training(model: Any) -> torch.Tensor:
    torch.manual_seed(0)
    found = output(model.train())
    model.eval()
    return found


@pytest.mark.parametrize("method", DRAWING)
@pytest.mark.parametrize("end", ["error", "close"])
def test_nothing_that_a_step_drew_outlives_the_run(method: str, end: str) -> None:
    model, expected = drawing(method), in_training(drawing(method))
    before_step(model, "a", 1, 9)
    assert not torch.equal(in_training(model), expected)  # the first step draws something else than the whole

    def fails(module: Any, *args: Any) -> None:
        if module.training:
            raise RuntimeError("in the middle of a step")

    broken = model.transformer.register_forward_hook(fails) if end == "error" else None
    steps = train.run(model, feed(), replace(SETTINGS, steps=9), name="a")
    with pytest.raises(RuntimeError, match="in the middle") if end == "error" else nullcontext():
        next(steps)
    if broken is not None:
        broken.remove()
    else:
        steps.close()
    fresh = drawing(method)
    for key, value in adapter_tensors(fresh, "a").items():
        value.data.copy_(adapter_tensors(model, "a")[key])
    assert torch.equal(in_training(model), in_training(fresh))


def test_a_run_may_end_after_its_adapter_is_gone() -> None:
    model = drawing("dylora")
    steps = train.run(model, feed(), SETTINGS, name="a")
    next(steps)
    lk.detach(model, "a")
    steps.close()


@every_method
def test_a_run_learns(method: str) -> None:
    model = model_with(method)
    few = feed(examples(6))
    settings = replace(SETTINGS, steps=40, accumulate=1, batch_size=6, learning_rate=2e-2, warmup_share=0.0)
    losses = [step.loss for step in train.run(model, few, settings, name="a")]
    assert min(losses[-5:]) < losses[0]
    with lk.use(model, None), torch.no_grad():
        assert torch.equal(model(tokens(model))[0], tiny("gpt2")(tokens(model))[0])


@every_method
def test_a_classifier_learns_with_every_method(method: str) -> None:
    torch.manual_seed(1)
    model = tiny("bert", labels=2)
    chosen = METHODS[method]
    if "classifier" not in {p.path for p in chosen.plan(model)}:
        chosen = replace(chosen, train=("classifier",))
    lk.attach(model, chosen, name="a")
    settings = replace(SETTINGS, steps=30, accumulate=1, batch_size=6, learning_rate=2e-2, warmup_share=0.0)
    losses = [step.loss for step in train.run(model, feed(examples(6, labels=2)), settings, name="a")]
    assert min(losses[-5:]) < losses[0]


@every_method
def test_a_loop_of_ones_own_does_the_same(method: str) -> None:
    """Three steps by hand, with the method's verbs around them, equal the loop's."""
    settings = replace(SETTINGS, steps=3, accumulate=1, clip_norm=0.0, warmup_share=0.0, padding=True)
    one, other = model_with(method), model_with(method)
    for _ in train.run(one, feed(), settings, name="a"):
        pass
    optimizer, plan = torch.optim.AdamW(lk.parameters(other, "a"), weight_decay=0.0), feed().plan(settings, 0)
    other.train()
    for step in range(1, 4):
        (batch,) = (feed().batch(chosen) for chosen in next(plan))
        before_step(other, "a", step, 3)
        loss = other(input_ids=batch.ids_BT, attention_mask=batch.attention_BT, labels=batch.labels_BT).loss
        added = penalty(other, "a")
        (loss if added is None else loss + added).backward()
        optimizer.param_groups[0]["lr"] = train.settings.learning_rate(step, 3, settings)
        optimizer.step()
        after_step(other, "a", step, 3)
        optimizer.zero_grad()
    mine, theirs = adapter_tensors(one, "a"), adapter_tensors(other, "a")
    for key, value in mine.items():
        assert torch.allclose(_learned(key, value), _learned(key, theirs[key]), rtol=1e-3, atol=1e-4), key


def _learned(key: str, value: torch.Tensor) -> torch.Tensor:
    """Without the keys' bias: softmax does not depend on it, so Adam follows the sign of rounding errors there."""
    return value.unflatten(0, (3, -1))[::2] if "bias" in key and "c_attn" in key else value


def test_the_output_side_learns_faster_with_a_ratio() -> None:
    moved = {}
    for ratio in (1.0, 16.0):
        model = model_with("lora")
        before = numbers(model)
        settings = replace(SETTINGS, steps=1, warmup_share=0.0, learning_rate=1e-4, outer_ratio=ratio, weight_decay=0.0)
        for _ in train.run(model, feed(), settings, name="a"):
            pass
        after = numbers(model)
        moved[ratio] = {side: _moved(before, after, side) for side in "AB"}
    assert moved[16.0]["B"] == pytest.approx(16 * moved[1.0]["B"], rel=1e-3)  # Adam's first step is the rate
    assert moved[16.0]["A"] == pytest.approx(moved[1.0]["A"], rel=1e-3, abs=1e-9)


def _moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], side: str) -> float:
    return max(float((after[key] - before[key]).abs().max()) for key in before if key.endswith(side))


def test_a_ratio_needs_an_output_side() -> None:
    with pytest.raises(BadMethod, match="bitfit has none"):
        next(train.run(model_with("bitfit"), feed(), replace(SETTINGS, outer_ratio=4.0), name="a"))
    with pytest.raises(LorakitError, match="outer_ratio=0"):
        replace(SETTINGS, outer_ratio=0.0)


@pytest.mark.filterwarnings("ignore")
def test_nothing_that_a_step_drew_outlives_the_trainer(tmp_path: Path) -> None:
    model = drawing("dropped")
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 64, (4, 6))]
    given = {"max_steps": 1, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True}
    arguments = TrainingArguments(output_dir=str(tmp_path), save_strategy="no", disable_tqdm=True, **given)
    rested: list[str] = []

    class Late(FollowMethod):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            rested.append("a")  # as where a run is cut short in a step

    Trainer(model, arguments, train_dataset=rows, callbacks=[Late("a")]).train()  # type: ignore[arg-type]
    fresh = drawing("dropped")
    for key, value in adapter_tensors(fresh, "a").items():
        value.data.copy_(adapter_tensors(model, "a")[key])
    assert rested and torch.equal(in_training(model), in_training(fresh))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["adalora", "dylora", "dynamic", "lora"])
def test_the_trainer_follows_a_method(method: str, tmp_path: Path) -> None:
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 64, (12, 6))]
    calls: list[tuple[str, int, int]] = []

    class Noting(FollowMethod):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            calls.append(("before", state.global_step + 1, state.max_steps))
            super().on_step_begin(args, state, control, **kwargs)

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert any(p.grad is not None for p in lk.parameters(kwargs["model"], "a"))
            calls.append(("after", state.global_step + 1, state.max_steps))
            super().on_optimizer_step(args, state, control, **kwargs)

    given = {"max_steps": 4, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True}
    arguments = TrainingArguments(output_dir=str(tmp_path), save_strategy="no", disable_tqdm=True, **given)
    model = model_with(method)
    Trainer(model, arguments, train_dataset=rows, callbacks=[Noting("a")]).train()  # type: ignore[arg-type]
    assert calls == [(when, step, 4) for step in range(1, 5) for when in ("before", "after")]

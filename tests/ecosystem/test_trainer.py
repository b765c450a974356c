"""transformers' Trainer trains an attached model unchanged; with the callback its checkpoints are adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

import lorakit as lk
from lorakit.core.state import adapter_tensors
from lorakit.errors import LorakitError
from lorakit.train.callback import SaveAdapter
from tests.ecosystem.small import ADAPTER_FILES, adapted, files_in, keys_of, loss_of, only_the_adapter_learns, rows
from tests.laws.cases import bits
from tests.tiny import tiny, tokens

STEPS = 12
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


def trainer(model: PreTrainedModel, out: Path, *callbacks: SaveAdapter, **arguments: Any) -> Trainer:
    usual = dict(max_steps=STEPS, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=1, save_steps=5)
    quiet = dict(report_to="none", disable_tqdm=True, use_cpu=True)
    return Trainer(
        model,
        TrainingArguments(str(out), **{**usual, **quiet, **arguments}),
        train_dataset=rows(),
        eval_dataset=rows(8),
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_trainer_trains_the_adapter_alone(family: str, tmp_path: Path) -> None:
    model = adapted(family)
    with only_the_adapter_learns(model):
        trained = trainer(model, tmp_path, save_strategy="no")
        assert trained.get_num_trainable_parameters() == lk.summary(model).trainable_parameters
        trained.train()
        losses = [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
        assert losses[-1] < 0.9 * losses[0]
    assert trained.evaluate()["eval_loss"] < losses[0]
    assert trained.predict(rows(4)).predictions.shape[:2] == (4, 8)
    assert files_in(tmp_path) == set()


def test_the_trainer_trains_a_classifier_with_its_head(tmp_path: Path) -> None:
    model = adapted("bert", labels=2)
    before, examples = bits(model), [{**row, "labels": number % 2} for number, row in enumerate(rows())]
    trained = trainer(model, tmp_path, SaveAdapter("a"))
    trained.train_dataset = examples
    trained.train()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if ".adapters." in key and "pooler" not in key}
    assert any("classifier.adapters" in key for key in changed)
    twin = tiny("bert", labels=2)
    lk.load(twin, tmp_path, name="b")
    ids = tokens(model)
    assert torch.equal(twin(ids).logits, model.eval()(ids).logits)


def test_with_the_callback_checkpoints_hold_the_adapter_and_nothing_else(tmp_path: Path) -> None:
    model = adapted()
    trainer(model, tmp_path, SaveAdapter("a")).train()
    folders = ("", "checkpoint-5/", "checkpoint-10/", "checkpoint-12/")
    assert files_in(tmp_path) == {f"{folder}{file}" for folder in folders for file in ADAPTER_FILES}
    saved = {folder: tiny("llama") for folder in ("checkpoint-5", "checkpoint-12", ".")}
    for folder, twin in saved.items():
        lk.load(twin, tmp_path / folder, name="a")
    assert loss_of(saved["."]) == loss_of(saved["checkpoint-12"]) == loss_of(model)
    assert loss_of(saved["checkpoint-5"]) > loss_of(model)


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (dict(save_total_limit=1), {"checkpoint-12"}),
        (dict(save_strategy="epoch", save_total_limit=2), {"checkpoint-9", "checkpoint-12"}),
        (dict(save_strategy="no"), set()),
    ],
)
def test_the_callback_follows_the_trainers_settings(arguments: dict[str, Any], kept: set[str], tmp_path: Path) -> None:
    trainer(adapted(), tmp_path, SaveAdapter("a"), **arguments).train()
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == kept
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == ADAPTER_FILES


def test_the_callback_refuses_to_load_the_best_model_at_the_end(tmp_path: Path) -> None:
    arguments = dict(load_best_model_at_end=True, eval_strategy="steps", eval_steps=5)
    best = trainer(adapted(), tmp_path, SaveAdapter("a"), **arguments)
    with pytest.raises(LorakitError, match="load_best_model_at_end=False"):
        best.train()


def test_without_the_callback_the_trainer_writes_the_base_alone(tmp_path: Path) -> None:
    model = adapted()
    trained = trainer(model, tmp_path, save_steps=STEPS, save_only_model=True)
    trained.train()
    base = set(tiny("llama").state_dict())
    assert keys_of(tmp_path / f"checkpoint-{STEPS}" / "model.safetensors") == base
    trained.save_model(str(tmp_path / "whole"))
    assert keys_of(tmp_path / "whole" / "model.safetensors") == base


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("reentrant", [None, *(pytest.param(mode, marks=pytest.mark.slow) for mode in (False, True))])
def test_gradient_checkpointing_gives_the_same_adapter(reentrant: bool | None, tmp_path: Path) -> None:
    plain, checkpointed = adapted(), adapted()
    trainer(plain, tmp_path, save_strategy="no").train()
    kwargs = None if reentrant is None else {"use_reentrant": reentrant}
    with only_the_adapter_learns(checkpointed):
        if reentrant:
            checkpointed.enable_input_require_grads()  # what transformers asks for with any frozen embedding
        settings = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs, save_strategy="no")
        trainer(checkpointed, tmp_path, **settings).train()
    wanted = adapter_tensors(plain, "a")
    for key, value in adapter_tensors(checkpointed, "a").items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-5, atol=1e-6)

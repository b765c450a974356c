from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import lorakit as lk
from lorakit.core.state import adapter_tensors
from lorakit.errors import LorakitError
from lorakit.train.callback import SaveAdapter
from tests.tiny import tiny
from tests.train.small import adapted

ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}


def trainer(out: Path, model: Any, **fields: Any) -> Trainer:
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 64, (12, 6))]
    given = {"max_steps": 6, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, **fields}
    arguments = TrainingArguments(output_dir=str(out), disable_tqdm=True, learning_rate=1e-2, **given)
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=[SaveAdapter("a")])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "checkpoints"),
    [
        ({"save_steps": 2, "save_total_limit": 2}, {"checkpoint-4", "checkpoint-6"}),
        ({"save_steps": 4}, {"checkpoint-4", "checkpoint-6"}),
        ({"save_strategy": "epoch"}, {"checkpoint-6"}),
        ({"save_strategy": "no"}, set()),
    ],
)
def test_the_trainer_saves_the_adapter_and_nothing_else(
    tmp_path: Path, fields: dict[str, Any], checkpoints: set[str]
) -> None:
    model = adapted()
    trainer(tmp_path, model, **fields).train()
    assert {path.name for path in tmp_path.iterdir()} == checkpoints | ADAPTER
    for folder in checkpoints:
        assert {path.name for path in (tmp_path / folder).iterdir()} == ADAPTER
    again = tiny("llama")
    lk.load(again, tmp_path, name="a")
    saved, trained = adapter_tensors(again, "a"), adapter_tensors(model, "a")
    assert all(torch.equal(saved[key], trained[key]) for key in trained)
    fresh = adapter_tensors(adapted(), "a")
    assert not any(torch.equal(fresh[key], trained[key]) for key in trained)


def test_a_best_model_cannot_be_loaded_from_adapters(tmp_path: Path) -> None:
    fields = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    with pytest.raises(LorakitError, match="load_best_model_at_end=False"):
        trainer(tmp_path, adapted(), **fields).train()

"""A callback for `transformers.Trainer` that saves the adapter and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorakit.core.files import save
from lorakit.errors import LorakitError


class SaveAdapter(TrainerCallback):
    """Save the adapter into each `checkpoint-<step>` folder and, at the end, into the output folder.

    Where the Trainer would have written the whole model, the adapter alone is written in its place; the Trainer's
    `save_strategy` and `save_total_limit` are followed. The optimiser is not saved: to go on from an interrupted run to
    the same bits, use `lorakit.train.run`.

    Example:
        ```python
        trainer = Trainer(model, args, train_dataset=rows, callbacks=[SaveAdapter("reviews")])
        ```
    """

    def __init__(self, name: str = "default") -> None:
        self.name = name
        self.written: list[Path] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.load_best_model_at_end:
            raise LorakitError("SaveAdapter writes the adapter in place of the Trainer's checkpoints, so there is none "
                               "to load at the end; set load_best_model_at_end=False")  # fmt: skip

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        return self._save_if_due(args, state, control, kwargs["model"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        return self._save_if_due(args, state, control, kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            save(kwargs["model"], self.name, args.output_dir)

    def _save_if_due(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any
    ) -> TrainerControl:
        if control.should_save and state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            save(model, self.name, folder)
            self.written = [*(path for path in self.written if path != folder), folder]
            self._drop_oldest(args.save_total_limit)
        control.should_save = False
        return control

    def _drop_oldest(self, limit: int | None) -> None:
        while limit and len(self.written) > limit:
            shutil.rmtree(self.written.pop(0))

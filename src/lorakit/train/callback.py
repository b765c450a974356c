"""Callbacks for `transformers.Trainer`: save the adapter and nothing else, and do what its method does at each step."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorakit.core.attach import parameters
from lorakit.core.files import save
from lorakit.core.stepping import after_step, before_step, penalty, rest
from lorakit.errors import LorakitError


class FollowMethod(TrainerCallback):
    """Do what an adapter's method does around each step: budgets and masks (AdaLoRA), drawn ranks (DyLoRA), penalties.

    Methods without such a part need no callback, and it does nothing for them. A penalty's gradients are added before
    the optimiser's step and clipped with the others; the Trainer's printed loss is without it.

    Example:
        ```python
        trainer = Trainer(model, args, train_dataset=rows, callbacks=[FollowMethod("reviews"), SaveAdapter("reviews")])
        ```
    """

    def __init__(self, name: str = "default") -> None:
        self.name = name

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        before_step(kwargs["model"], self.name, state.global_step + 1, state.max_steps)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        added = penalty(kwargs["model"], self.name)
        if added is None:
            return
        added.backward()
        if args.max_grad_norm:  # the Trainer has clipped the loss's own gradients by now
            torch.nn.utils.clip_grad_norm_(parameters(kwargs["model"], self.name), args.max_grad_norm)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        after_step(kwargs["model"], self.name, state.global_step + 1, state.max_steps)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        rest(kwargs["model"], self.name)


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

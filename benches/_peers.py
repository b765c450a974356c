"""Libraries that train one adapter on the same batches, each as an iterator that takes a step and gives its loss.

All start from the same A and B: ours writes them as a PEFT folder, the peers read it. The base's weights are shared
between them; only full fine-tuning has its own, with the adapter merged in, so that its first loss is the others'.
Blocks that are to be recomputed are so by the same call of transformers in all of them.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
from datasets import Dataset
from greenlet import getcurrent, greenlet
from huggingface_hub import constants
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

import lorakit as lk
from lorakit import models
from lorakit.core.state import adapter_tensors
from lorakit.data import Encoded, collate
from lorakit.train import Feed, Train, run
from lorakit.train.recompute import recomputed

BASE, NAME = "smollm2-135m", "bench"
RATE, CLIP = 1e-4, 1.0
PEFT_PREFIX = "base_model.model."
QUIET = dict(report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, label_names=["labels"])
TRL = dict(bf16=False, activation_checkpointing=False, packing=False, max_length=None)  # like all others
Batches = Sequence[Sequence[Encoded]]


@dataclass(frozen=True)
class Base:
    """A model to be adapted: SmolLM2, or a Llama of some shape with random weights."""

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    shape: Mapping[str, Any] | None = None  # fields of a LlamaConfig

    def load(self) -> tuple[Any, Any]:
        """The model, made or put on its device, and what knows the id of its padding."""
        if self.shape is None:
            model, tokenizer = models.load(BASE, dtype=self.dtype)
            return model.to(self.device), tokenizer
        torch.manual_seed(0)
        with torch.device(self.device):  # where the weights are drawn, in their own dtype
            model = AutoModelForCausalLM.from_config(LlamaConfig(**self.shape), dtype=self.dtype)
        return model.eval(), SimpleNamespace(pad_token_id=0)


@dataclass(frozen=True)
class Task:
    """What every library is given."""

    batches: Batches  # of equal size; taken in turn, again and again
    method: lk.LoRA
    steps: int  # the most that will be taken
    base: Base = Base()
    checkpointing: Literal["none", "blocks"] = "none"


@dataclass(frozen=True)
class Library:
    """A model that is trained, and its steps."""

    model: Any
    steps: Iterator[float]
    adapter: Mapping[str, nn.Parameter]  # A and B by path; empty for full fine-tuning


@contextmanager
def libraries(names: Sequence[str], task: Task) -> Iterator[dict[str, Library]]:
    """The named ones, ready for their first step."""
    base, tokenizer = task.base.load()
    twins = {name: twin(base) for name in names if name in PEERS}
    adapt(base, task.method)
    with tempfile.TemporaryDirectory() as folder:
        lk.save(base, NAME, folder)
        found = {}
        for name in names:
            if name == "ours":
                found[name] = Library(base, ours(base, tokenizer, task), adapter_of(base))
            elif name == "full":
                found[name] = Library(model := merged(task, folder), plain(model, tokenizer, task, folder), {})
            else:
                model = PeftModel.from_pretrained(twins[name], folder, is_trainable=True)
                found[name] = Library(model, PEERS[name](model, tokenizer, task, folder), peft_adapter_of(model))
        try:
            yield found
        finally:
            for library in found.values():
                library.steps.close()  # type: ignore[attr-defined]  # all are generators


def twin(model: Any) -> Any:
    """A model of its own on the same weights."""
    shared = {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in model.parameters()}
    other = copy.deepcopy(model, shared)
    other.config.use_cache = False
    return other


def merged(task: Task, folder: str) -> Any:
    """A base with the adapter in its weights, all of which are trained."""
    model = PeftModel.from_pretrained(task.base.load()[0], folder).merge_and_unload()
    model.config.use_cache = False
    return model.requires_grad_(True)


def adapt(model: Any, method: lk.LoRA) -> None:
    """Attach the adapter, with A and B both away from zero."""
    torch.manual_seed(0)
    lk.attach(model, method, name=NAME)
    with torch.no_grad():
        for name, tensor in adapter_tensors(model, NAME).items():
            if name.endswith(".B"):
                tensor.normal_(std=0.02)


def adapter_of(model: Any) -> dict[str, nn.Parameter]:
    """Our A and B by the path of their layer."""
    names = ((name.rsplit(".", 2), parameter) for name, parameter in adapter_tensors(model, NAME).items())
    return {f"{path}.{factor}": parameter for (path, _, factor), parameter in names}


def peft_adapter_of(model: Any) -> dict[str, nn.Parameter]:
    """PEFT's A and B, likewise."""
    return {
        name.removeprefix(PEFT_PREFIX).replace(".lora_", ".").removesuffix(".default.weight"): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def ours(model: Any, tokenizer: Any, task: Task) -> Iterator[float]:
    """`lorakit.train.run`, as it comes."""
    rows = len(task.batches[0])
    feed = Feed(list(itertools.chain(*task.batches)), tokenizer.pad_token_id, collate, in_order)
    settings = Train(
        steps=task.steps,
        batch_size=rows,
        learning_rate=RATE,
        warmup_share=0,
        clip_norm=CLIP,
        checkpointing=task.checkpointing,
    )
    for step in run(model, feed, settings, name=NAME):
        yield step.loss


def in_order(lengths: Sequence[int], size: int, seed: int, epoch: int, groups: object = None) -> list[list[int]]:
    """Batches as they are given."""
    return [list(range(at, at + size)) for at in range(0, len(lengths), size)]


def plain(model: Any, tokenizer: Any, task: Task, folder: str) -> Iterator[float]:
    """A loop as most people write it, with the model's own loss."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    schedule, padded = get_linear_schedule_with_warmup(optimizer, 0, task.steps), collator(tokenizer, model.device)
    model.train()
    with recomputed(model, Train(checkpointing=task.checkpointing)):
        for batch in itertools.cycle(task.batches):
            loss = model(**padded(batch)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            yield loss.item()


def collator(tokenizer: Any, device: Any = "cpu") -> Callable[[Sequence[Encoded]], dict[str, torch.Tensor]]:
    """Rows padded on the right to the longest, as the models' arguments; a Trainer moves them by itself."""

    def padded(batch: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        found = collate(batch, tokenizer.pad_token_id)
        rows = {"input_ids": found.ids_BT, "attention_mask": found.attention_BT, "labels": found.labels_BT}
        return {name: tensor.to(device) for name, tensor in rows.items()}

    return padded


def trainer(model: Any, tokenizer: Any, task: Task, folder: str) -> Iterator[float]:
    """`transformers.Trainer`."""
    args = TrainingArguments(**QUIET, **shared_arguments(task, folder))
    examples = list(itertools.chain(*task.batches))
    return paused(Trainer(model, args, data_collator=collator(tokenizer), train_dataset=examples))


def trl(model: Any, tokenizer: Any, task: Task, folder: str) -> Iterator[float]:
    """TRL's SFTTrainer with its own loss and collator, without packing, mixed precision and checkpointing."""
    constants.HF_HUB_DISABLE_TELEMETRY = True  # SFTTrainer would report that it was made
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(**QUIET, **TRL, **shared_arguments(task, folder), dataset_kwargs={"skip_prepare_dataset": True})
    rows = [{"input_ids": list(e.ids), "labels": labels(e)} for e in itertools.chain(*task.batches)]
    return paused(SFTTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer))


def shared_arguments(task: Task, folder: str) -> dict[str, Any]:
    """What both trainers are told: the task, and the rate and clipping of the plain loop; the rate falls in a line."""
    return dict(
        output_dir=folder,
        per_device_train_batch_size=len(task.batches[0]),
        max_steps=task.steps,
        train_sampling_strategy="sequential",
        learning_rate=RATE,
        max_grad_norm=CLIP,
        use_cpu=task.base.device == "cpu",
        dataloader_pin_memory=False,
    )


def labels(example: Encoded) -> list[int]:
    """One label a token, -100 where nothing is to be learned."""
    return [-100] * example.start + list(example.ids[example.start :])


def paused(trainer: Any) -> Iterator[float]:
    """`trainer.train()`, stopped after each step until the next one is asked for; gives the step's loss."""
    losses: list[float] = []
    take = trainer.training_step
    trainer.training_step = lambda *args: losses.append((loss := take(*args)).item()) or loss
    trainer.add_callback(Pause())
    training = greenlet(trainer.train)
    try:
        while training.switch() is Pause:
            yield losses.pop()
    finally:
        if not training.dead:
            training.throw()


class Pause(TrainerCallback):
    """Hand over to whoever runs the training, after each step."""

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        getcurrent().parent.switch(Pause)


PEERS = {"peft": plain, "trainer": trainer, "trl": trl}

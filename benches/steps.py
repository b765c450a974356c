"""A training step of DoRA and AdaLoRA beside LoRA's and beside PEFT's, on SmolLM2-135M, interleaved.

Every adapter comes from PEFT's folder of its own, so both packages start from the same tensors; loss and gradients are
compared before anything is timed.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from _record import options, record
from peft import AdaLoraConfig, LoraConfig, get_peft_model

import lorakit as lk
from lorakit import models
from lorakit.core.stepping import after_step, before_step, penalty

BASE, TOTAL = "smollm2-135m", 1000
BARS = {"dora": 1.25, "adalora": 1.2}  # times LoRA's step
TOLERANCE = 1e-4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS),
    "dora": lambda: LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, use_dora=True),
    "adalora": lambda: AdaLoraConfig(**ADALORA, target_modules=TARGETS, task_type="CAUSAL_LM"),
}
# PEFT adds the penalty only where it is told the task.
ADALORA = dict(init_r=8, target_r=4, lora_alpha=16, total_step=TOTAL, tinit=0, tfinal=1, deltaT=1)


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    rows: int = 4
    tokens: int = 128
    rounds: int = 8


def main() -> None:
    """Compare, time in turn, print, write, and fail where a bar is missed."""
    parser = options(__doc__)
    parser.add_argument("--quick", action="store_true", help="few tokens and rounds: shows that it runs, nothing else")
    arguments = parser.parse_args()
    sizes = Sizes(rows=1, tokens=16, rounds=2) if arguments.quick else Sizes()
    ids = torch.randint(100, 40000, (sizes.rows, sizes.tokens), generator=torch.Generator().manual_seed(0))
    ours, theirs = both()
    for name in CONFIGS:
        compare(name, ours, theirs[name], ids)
    steps = {f"lorakit {name}": our_step(ours, name, ids) for name in CONFIGS}
    steps |= {f"peft {name}": their_step(theirs[name], name, ids) for name in CONFIGS}
    seconds = interleaved(steps, sizes.rounds)
    ratios = {name: {
        "to lorakit's LoRA": seconds[f"lorakit {name}"] / seconds["lorakit lora"],
        "PEFT's to PEFT's LoRA": seconds[f"peft {name}"] / seconds["peft lora"],
        "to PEFT's": seconds[f"lorakit {name}"] / seconds[f"peft {name}"],
    } for name in CONFIGS}  # fmt: skip
    found = {"quick": arguments.quick, "sizes": vars(sizes), "seconds": seconds, "ratios": ratios, "bars": BARS}
    record("steps", found, arguments.json)
    for name, told in ratios.items():
        print(f"{name:>8}: " + ", ".join(f"{value:.2f} {what}" for what, value in told.items()))
    missed = [name for name, bar in BARS.items() if ratios[name]["to lorakit's LoRA"] > bar]
    if missed and not arguments.quick:
        sys.exit(f"a step may cost at most {', '.join(f'{BARS[name]} times for {name}' for name in missed)}")


def both() -> tuple[Any, dict[str, Any]]:
    """One model with our three adapters, and PEFT's three models, from the same scrambled tensors."""
    ours, theirs = models.load(BASE)[0], {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        theirs[name] = get_peft_model(models.load(BASE)[0], config()).train()
        with torch.no_grad():
            for key, value in theirs[name].named_parameters():
                if value.requires_grad and "magnitude" not in key:
                    value.add_(torch.randn_like(value), alpha=0.01)
        with tempfile.TemporaryDirectory() as folder:
            theirs[name].save_pretrained(folder)
            lk.load(ours, folder, name=name, trainable=True)
    return ours.train(), theirs


def compare(name: str, ours: Any, theirs: Any, ids: torch.Tensor) -> None:
    """The same loss, and gradients of the same length."""
    found = []
    for model, what in ((ours, name), (theirs, None)):
        trained = lk.parameters(model, what) if what else [p for p in model.parameters() if p.requires_grad]
        if what:
            lk.use(model, what)
        loss = model(input_ids=ids, labels=ids).loss
        added = penalty(model, what) if what else None  # PEFT adds it by itself
        loss = loss if added is None else loss + added
        loss.backward()
        lengths = torch.stack([p.grad.norm() for p in trained if p.grad is not None])
        found.append((loss.detach(), lengths.norm()))
        model.zero_grad()
    (loss, norm), (their_loss, their_norm) = found
    worst = max(float((loss - their_loss).abs() / their_loss), float((norm - their_norm).abs() / their_norm))
    if not worst <= TOLERANCE:
        sys.exit(f"{name}: loss or gradients differ from PEFT's by {worst:.1e}, more than {TOLERANCE:.0e}")
    print(f"{name}: agrees with PEFT to {worst:.1e}", flush=True)


def our_step(model: Any, name: str, ids: torch.Tensor) -> Callable[[], None]:
    """A step with all that the method does around it, at a rate of zero."""
    optimizer = torch.optim.AdamW(lk.parameters(model, name), lr=0.0, weight_decay=0.0)

    def step() -> None:
        lk.use(model, name)
        before_step(model, name, 2, TOTAL)
        loss = model(input_ids=ids, labels=ids).loss
        added = penalty(model, name)
        (loss if added is None else loss + added).backward()
        optimizer.step()
        after_step(model, name, 2, TOTAL)
        optimizer.zero_grad()

    return step


def their_step(model: Any, name: str, ids: torch.Tensor) -> Callable[[], None]:
    """The same with PEFT."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        if name == "adalora":
            model.base_model.update_and_allocate(2)
        optimizer.zero_grad()

    return step


def interleaved(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """The median seconds of each, taken in turn; the first round warms up."""
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            spent[name].append(time.perf_counter() - began)
    return {name: median(values[1:]) for name, values in spent.items()}


if __name__ == "__main__":
    main()

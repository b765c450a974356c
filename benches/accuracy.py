"""Held-out accuracy of SmolLM2-135M on film reviews after the demo's training, by lorakit and PEFT on the same batches.

Both start from the same A and B and see the same token ids in the same order, at the same learning rates and with the
same clipping. PEFT's side is a loop of its own with the model's own loss. First, one step of both is compared.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

import torch
from _record import options, record
from peft import PeftModel
from torch import Tensor, nn

import lorakit as lk
from lorakit import models
from lorakit.core.state import adapter_tensors
from lorakit.data import Data, Dataset, collate, encode, open_data, order
from lorakit.evaluate import label_accuracy
from lorakit.reproduce.demo import FULL as DEMO
from lorakit.train import Feed, Train, run
from lorakit.train.loss import loss_for
from lorakit.train.settings import learning_rate

BASE, NAME, PACKAGES = "smollm2-135m", "reviews", ("lorakit", "peft")
METHOD = lk.LoRA(rank=8, alpha=16, targets=("attn.q", "attn.v"))
TRAIN = dict(epochs=1, batch_size=16, learning_rate=1e-3)  # the demo's
LEAST_ACCURACY, LEAST_TESTS = 0.84, 1000
TOLERANCE = 1e-4  # of the largest value, for loss and gradients of the first step


@dataclass(frozen=True)
class Sizes:
    """How much of everything; None: all test reviews."""

    seeds: tuple[int, ...]
    train: int
    test: int | None


FULL = Sizes(seeds=(0, 1, 2), train=DEMO.train, test=None)
QUICK = Sizes(seeds=(0,), train=32, test=40)


def main() -> None:
    """Compare one step, train both on each seed, print, write, and fail where the accuracy is too low."""
    parser = options(__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, few examples: shows that it runs, nothing else")
    arguments = parser.parse_args()
    sizes = QUICK if arguments.quick else FULL
    model, tokenizer = models.load(BASE)
    compare_first_step(model, tokenizer, feed_of(reviews(sizes, sizes.seeds[0]), tokenizer))
    found: dict[str, list[float]] = {package: [] for package in PACKAGES}
    for seed in sizes.seeds:
        for package, accuracy in of_seed(model, tokenizer, reviews(sizes, seed), seed).items():
            found[package].append(accuracy)
        print(f"seed {seed}:", *(f"{package} {values[-1]:.4f}" for package, values in found.items()), flush=True)
    data = reviews(sizes, sizes.seeds[0])
    base = label_accuracy(model, tokenizer, data.test, data.labels)
    record("accuracy", result(found, base, sizes, len(data.test)), arguments.json)
    report(found, base, len(data.test))
    if not arguments.quick and (mean(found["lorakit"]) < LEAST_ACCURACY or len(data.test) < LEAST_TESTS):
        sys.exit(f"the accuracy has to be at least {LEAST_ACCURACY} on {LEAST_TESTS} or more reviews")


def reviews(sizes: Sizes, seed: int) -> Dataset:
    """The reviews to train on, drawn by the seed, and those to test on, which no seed changes."""
    return open_data(Data(source="reviews", train_examples=sizes.train, test_examples=sizes.test, seed=seed))


def feed_of(data: Dataset, tokenizer: Any) -> Feed:
    """The training reviews as batches."""
    return Feed(encode(data.train, tokenizer, 512), tokenizer.pad_token_id, collate, order)


def of_seed(model: Any, tokenizer: Any, data: Dataset, seed: int) -> dict[str, float]:
    """Accuracy of both on the test reviews after training from one initialisation on one order of batches."""
    feed, settings = feed_of(data, tokenizer), Train(seed=seed, **TRAIN)
    torch.manual_seed(seed)
    lk.attach(model, METHOD, name=NAME)
    other = as_peft(model)
    for _ in run(model, feed, settings, name=NAME):
        pass
    train_peft(other, feed, settings)
    accuracies = {
        "lorakit": label_accuracy(model, tokenizer, data.test, data.labels),
        "peft": label_accuracy(other.get_base_model(), tokenizer, data.test, data.labels),
    }
    lk.detach(model, NAME)
    return accuracies


def as_peft(model: nn.Module) -> Any:
    """The same adapter on a base of its own, by way of its folder."""
    with tempfile.TemporaryDirectory() as folder:
        lk.save(model, NAME, folder)
        return PeftModel.from_pretrained(models.load(BASE)[0], folder, is_trainable=True)


def train_peft(model: Any, feed: Feed, settings: Train) -> None:
    """PEFT's adapter in a plain loop: the batches, rates and clipping of `lorakit.train.run`."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, steps = torch.optim.AdamW(trained, weight_decay=settings.weight_decay), feed.steps(settings)
    model.train()
    for step, (numbers, *_) in zip(range(1, steps + 1), feed.plan(settings, 0), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, settings)
        peft_loss(model, feed, numbers).backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad()


def peft_loss(model: Any, feed: Feed, numbers: list[int]) -> Tensor:
    """The model's own loss on a batch."""
    batch = feed.batch(numbers)
    return model(input_ids=batch.ids_BT, attention_mask=batch.attention_BT, labels=batch.labels_BT).loss


def compare_first_step(model: Any, tokenizer: Any, feed: Feed) -> None:
    """Check that loss and all gradients of one batch agree, with A and B both away from zero."""
    torch.manual_seed(0)
    lk.attach(model, METHOD, name=NAME)
    ours = adapter_tensors(model, NAME)
    with torch.no_grad():
        for name, tensor in ours.items():
            if name.endswith(".B"):
                tensor.normal_(std=0.02)
    other = as_peft(model)
    numbers = next(feed.plan(Train(**TRAIN), 0))[0]
    with lk.use(model, None):
        loss = loss_for(model, feed, Train(**TRAIN))
    (portion,) = loss.portions([feed.examples[number] for number in numbers], Train().forward_tokens)
    lost = torch.tensor(loss.backward(model, portion, portion.labelled) / portion.labelled)
    peft_lost = peft_loss(other, feed, numbers)
    peft_lost.backward()
    worst = float(torch.stack([distance(lost, peft_lost), *distances(ours, dict(other.named_parameters()))]).max())
    lk.detach(model, NAME)
    if not worst <= TOLERANCE:
        sys.exit(f"loss or gradients of the first step differ by {worst:.1e} of the largest, more than {TOLERANCE:.0e}")
    print(f"first step: loss {lost:.6f}, PEFT's {peft_lost:.6f}; loss and gradients agree to {worst:.1e}")


def distances(ours: Mapping[str, nn.Parameter], theirs: Mapping[str, nn.Parameter]) -> Iterator[Tensor]:
    """The distance of each of our gradients from PEFT's."""
    for name, tensor in ours.items():
        path, _, factor = name.rsplit(".", 2)
        twin = theirs[f"base_model.model.{path}.lora_{factor}.default.weight"]
        assert tensor.grad is not None
        assert twin.grad is not None
        yield distance(tensor.grad, twin.grad)


def distance(one: Tensor, other: Tensor) -> Tensor:
    """max |difference| / max |other|."""
    return (one - other).detach().abs().max() / other.detach().abs().max()


def result(found: Mapping[str, list[float]], base: float, sizes: Sizes, tests: int) -> dict[str, Any]:
    """What is written down."""
    return {
        "quick": sizes == QUICK,
        "base": BASE,
        "method": METHOD.to_json(),
        "train": asdict(Train(**TRAIN)),
        "sizes": asdict(sizes) | {"test": tests},
        "accuracy_before": base,
        "accuracy": found,
        "mean": {package: mean(values) for package, values in found.items()},
        "spread": {package: spread(values) for package, values in found.items()},
        "least_accuracy": LEAST_ACCURACY,
    }


def spread(values: list[float]) -> float:
    """The standard deviation of a sample, 0 for a single value."""
    return stdev(values) if len(values) > 1 else 0.0


def report(found: Mapping[str, list[float]], base: float, tests: int) -> None:
    """Print mean and spread of both."""
    print(f"accuracy on {tests} held-out reviews; the base alone: {base:.4f}")
    for package, values in found.items():
        runs = f"{min(values):.4f} to {max(values):.4f} in {len(values)} runs"
        print(f"{package:>8}: {mean(values):.4f} ± {spread(values):.4f} ({runs})")


if __name__ == "__main__":
    main()

"""Adapt a model in a PyTorch loop of your own.

    python examples/plain_loop.py                      # a tiny random model: offline, in seconds
    python examples/plain_loop.py --base smollm2-135m

The loop is the one that you would write without lorakit: it only takes its parameters from `lk.parameters`.
"""

from __future__ import annotations

import torch
from _setting import base, options, reviews

import lorakit as lk
from lorakit.data import collate, encode, order


def main() -> None:
    """Attach, train, save."""
    arguments = options(__doc__).parse_args()
    model, tokenizer = base(arguments.base)
    lk.attach(model, lk.LoRA(rank=8, alpha=16, targets="linear"), name="reviews")
    print(lk.summary(model))

    examples = encode(reviews(), tokenizer, max_length=64)
    lengths = [len(example.ids) for example in examples]
    batches = [numbers for epoch in range(arguments.steps) for numbers in order(lengths, 16, seed=0, epoch=epoch)]
    optimizer = torch.optim.AdamW(lk.parameters(model, "reviews"), lr=2e-3)
    model.train()
    for step, numbers in enumerate(batches[: arguments.steps], start=1):
        batch = collate([examples[number] for number in numbers], tokenizer.pad_token_id)
        loss = model(input_ids=batch.ids_BT, attention_mask=batch.attention_BT, labels=batch.labels_BT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (1, arguments.steps):
            print(f"step {step}: loss {loss.item():.3f}")

    lk.save(model, "reviews", arguments.out)
    print(f"the adapter is in {arguments.out}")


if __name__ == "__main__":
    main()

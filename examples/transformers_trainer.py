"""Adapt a model with transformers' Trainer; a callback saves the adapter in place of the whole model.

    python examples/transformers_trainer.py                      # a tiny random model: offline, in seconds
    python examples/transformers_trainer.py --base smollm2-135m
"""

from __future__ import annotations

from _setting import base, options, reviews
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import lorakit as lk
from lorakit.data import encode
from lorakit.train.callback import SaveAdapter


def main() -> None:
    """Attach, train, save."""
    arguments = options(__doc__).parse_args()
    model, tokenizer = base(arguments.base)
    lk.attach(model, lk.LoRA(rank=8, alpha=16, targets="linear"), name="reviews")
    print(lk.summary(model))

    rows = [
        {"input_ids": list(example.ids), "labels": [-100] * example.start + list(example.ids[example.start :])}
        for example in encode(reviews(), tokenizer, max_length=64)
    ]
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(arguments.out),
            max_steps=arguments.steps,
            per_device_train_batch_size=16,
            learning_rate=2e-3,
            save_steps=20,
            logging_steps=10,
            report_to="none",
        ),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        train_dataset=rows,
        callbacks=[SaveAdapter("reviews")],
    )
    trainer.train()
    print(f"the adapter is in {arguments.out}, and as it was every 20 steps in {arguments.out}/checkpoint-*")


if __name__ == "__main__":
    main()

"""Adapt a model with TRL's SFTTrainer; a callback saves the adapter in place of the whole model.

    python examples/trl_sft.py                      # a tiny random model: offline, in seconds
    python examples/trl_sft.py --base smollm2-135m
"""

from __future__ import annotations

import torch
from _setting import base, options, reviews
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import lorakit as lk
from lorakit.train.callback import SaveAdapter


def main() -> None:
    """Attach, train, save."""
    arguments = options(__doc__).parse_args()
    model, tokenizer = base(arguments.base)
    lk.attach(model, lk.LoRA(rank=8, alpha=16, targets="linear"), name="reviews")
    print(lk.summary(model))

    rows = [{"prompt": example.context, "completion": example.target} for example in reviews()]
    trainer = SFTTrainer(
        model,
        SFTConfig(
            output_dir=str(arguments.out),
            max_steps=arguments.steps,
            per_device_train_batch_size=16,
            learning_rate=2e-3,
            max_length=64,
            save_steps=20,
            logging_steps=10,
            bf16=torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[SaveAdapter("reviews")],
    )
    trainer.train()
    print(f"the adapter is in {arguments.out}, and as it was every 20 steps in {arguments.out}/checkpoint-*")


if __name__ == "__main__":
    main()

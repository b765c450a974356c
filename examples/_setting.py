"""What the examples share: their options, a base model, and a toy task.

Without `--base` the model is a tiny Llama with random weights, made on the spot: everything runs offline in seconds.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lorakit import models
from lorakit.data import Example

LABELS, GERMAN = ("negative", "positive"), ("schlecht", "gut")
WORDS = (("dull", "clumsy", "hollow", "noisy"), ("tender", "funny", "brilliant", "graceful"))
THINGS = ("film", "story", "comedy", "script", "cast", "ending")


def options(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all examples share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a packaged model, a folder, a GGUF file or a hub id; default: a tiny one")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("out/example"), help="folder for the adapter")
    return parser


def reviews(labels: tuple[str, str] = LABELS) -> list[Example]:
    """One-line reviews and what should follow them; other `labels` make another task of the same texts."""
    texts = [(label, word, thing) for label in (0, 1) for word, thing in itertools.product(WORDS[label], THINGS)]
    return [
        Example(f"Review: a {word} {thing}\nSentiment:", f" {labels[label]}", label) for label, word, thing in texts
    ]


def base(name: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The named model and its tokenizer, or the tiny ones."""
    if name:
        return models.load(name)
    tokenizer = _tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def _tokenizer() -> PreTrainedTokenizerBase:
    """Bytes, and the commonest pairs of them in the reviews."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=384, special_tokens=["<end>", "<pad>"], initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    examples = [*reviews(), *reviews(GERMAN)]
    tokenizer.train_from_iterator([example.context + example.target for example in examples], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")

"""Texts that a causal model writes, and how many of them are exactly the wanted ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorakit.data.examples import Example
from lorakit.data.tokens import encode
from lorakit.errors import BadData
from lorakit.evaluate import metrics
from lorakit.evaluate.setting import evaluating, require_writer
from lorakit.models import longest


def generate_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
) -> list[str]:
    """What the model writes after each prompt, in the prompts' order; at temperature 0 always the likeliest token.

    Above 0 each token is drawn from the whole distribution, the same one for the same seed and batch size. Under
    `use(model, [...])`, one adapter a row, give as many prompts as rows and a batch size that holds them all. A prompt
    that leaves no room for the new tokens is cut on the left.

    Raises:
        BadModel: the model has no language-model head.
        BadData: an empty prompt, or more new tokens than the model has positions.
    """
    require_writer(model)
    texts: list[str] = []
    device = model.device
    with evaluating(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            texts += _generate(model, tokenizer, list(prompts[start : start + batch_size]), max_new_tokens, temperature)
    return texts


def exact_match(
    model: Any, tokenizer: Any, examples: Sequence[Example], *, max_new_tokens: int = 16, batch_size: int = 16
) -> float:
    """The share of examples for which the model, always taking the likeliest token, writes exactly the target."""
    prompts = [example.context for example in examples]
    texts = generate_texts(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return metrics.exact_match(texts, [example.target for example in examples])


def _generate(model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int, temperature: float) -> list[str]:
    from transformers import GenerationConfig

    room = longest(model) - max_new_tokens
    if room < 1:
        raise BadData(f"max_new_tokens={max_new_tokens} leaves no room for a prompt: the model's positions reach "
                      f"{longest(model)} tokens")  # fmt: skip
    ids_BT, attention_BT = _padded_left(tokenizer, prompts, room)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
        eos_token_id=_ends(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    written = model.generate(
        input_ids=ids_BT.to(model.device), attention_mask=attention_BT.to(model.device), generation_config=config
    )
    return list(tokenizer.batch_decode(written[:, ids_BT.shape[1] :], skip_special_tokens=True))


def _padded_left(tokenizer: Any, prompts: list[str], room: int) -> tuple[Tensor, Tensor]:
    """Token ids, made as those of a training context are, and attention."""
    encoded = encode([Example(prompt, "") for prompt in prompts], tokenizer, room, with_eos=False)
    if not all(example.ids for example in encoded):
        raise BadData("a prompt is empty, and this tokenizer has no token that begins a text; give it a word to start")
    width = max(len(example.ids) for example in encoded)
    ids_BT = torch.full((len(prompts), width), tokenizer.pad_token_id)
    attention_BT = torch.zeros_like(ids_BT)
    for row, example in enumerate(encoded):
        ids_BT[row, width - len(example.ids) :] = torch.tensor(example.ids)
        attention_BT[row, width - len(example.ids) :] = 1
    return ids_BT, attention_BT


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a text: the tokenizer's, which targets end in, and those of the model's own settings."""
    of_model = model.generation_config.eos_token_id
    of_model = of_model if isinstance(of_model, list) else [of_model]
    return sorted({token for token in (tokenizer.eos_token_id, *of_model) if token is not None})

"""Tiny GPT-2 and BERT run by hand, in plain torch, with changes of one's own at the places where adapters act."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

import lorakit as lk
from lorakit.core.method import Method
from lorakit.core.state import adapter_tensors
from tests.laws.cases import close, output, scramble
from tests.tiny import tiny, tokens

Change = Callable[..., Tensor]


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, heads: int = 4) -> Tensor:
    """Scaled dot-product attention over (B, T, d), written out."""
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)


def gpt2_by_hand(model: PreTrainedModel, ids: Tensor, at: Callable[[int, str], Change]) -> Tensor:
    """GPT-2's logits, with a change after attention, after the MLP and at the end of each block."""
    base = model.transformer
    h = base.wte(ids) + base.wpe(torch.arange(ids.shape[1]))
    for number, block in enumerate(base.h):
        q, k, v = block.attn.c_attn(block.ln_1(h)).chunk(3, -1)
        h = h + at(number, "attn.o")(block.attn.c_proj(attention(q, k, v, causal=True)))
        h = h + at(number, "mlp.down")(block.mlp.c_proj(block.mlp.act(block.mlp.c_fc(block.ln_2(h)))))
        h = at(number, "block")(h)
    return model.lm_head(base.ln_f(h))


def bert_by_hand(model: PreTrainedModel, ids: Tensor, at: Callable[[int, str], Change]) -> Tensor:
    """BERT's last hidden states, with the same changes, and one around the last norm: it gets (x, LN)."""
    h = model.embeddings(ids)
    for number, block in enumerate(model.encoder.layer):
        own, out = block.attention.self, block.attention.output
        mixed = attention(own.query(h), own.key(h), own.value(h), causal=False)
        h = out.LayerNorm(at(number, "attn.o")(out.dense(mixed)) + h)
        up = at(number, "mlp.down")(block.output.dense(F.gelu(block.intermediate.dense(h))))
        norm = block.output.LayerNorm
        s = up + h
        h = at(number, "block")(norm(at(number, "norm.mlp")(norm(s), s)))
    return h


def nothing(y: Tensor, s: Tensor | None = None) -> Tensor:
    return y if s is None else s


def trained(family: str, method: Method) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    model = tiny(family, torch.float64)
    lk.attach(model, method, name="a")
    scramble(model, "a", std=0.2)
    return model, dict(adapter_tensors(model, "a"))


def agrees(family: str, model: PreTrainedModel, at: Callable[[int, str], Change]) -> bool:
    """Whether the attached model gives what the plain one gives with changes made by hand, to double precision."""
    by_hand = {"gpt2": gpt2_by_hand, "bert": bert_by_hand}[family]
    with torch.no_grad():
        plain = by_hand(tiny(family, torch.float64), tokens(model), lambda number, role: nothing)
        expected = by_hand(tiny(family, torch.float64), tokens(model), at)
        with lk.use(model, None):
            assert close(output(model), plain, 1e-12)
        assert not close(expected, plain, 1e-2)
        return close(output(model), expected, 1e-12)


PATHS = {
    ("gpt2", "attn.o"): "transformer.h.{}.attn.c_proj.attn_o.",
    ("gpt2", "mlp.down"): "transformer.h.{}.mlp.c_proj.mlp_down.",
    ("gpt2", "block"): "transformer.h.{}.block.",
    ("bert", "attn.o"): "encoder.layer.{}.attention.output.dense.attn_o.",
    ("bert", "mlp.down"): "encoder.layer.{}.output.dense.mlp_down.",
    ("bert", "norm.mlp"): "encoder.layer.{}.output.LayerNorm.norm_mlp.",
    ("bert", "block"): "encoder.layer.{}.block.",
}

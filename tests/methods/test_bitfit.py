"""BitFit trains the biases, all of them and nothing else."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from transformers import AutoModelForMaskedLM, GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaModel

import lorakit as lk
from lorakit.core.state import adapter_tensors, attached_to
from lorakit.errors import BadMethod, NoSuchTarget
from lorakit.methods.bitfit import BitFit
from tests.laws.cases import close, output, scramble
from tests.tiny import tiny, tokens

ROBERTA = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
GPT3 = GPT2Config(n_layer=96, n_embd=12288, n_head=96, n_positions=2048)
BLOCK = 11 * 12288  # q, k, v and out: 4 d; the MLP: 4 d + d; two norms: 2 d


@pytest.mark.parametrize(
    ("kind", "config", "options", "parameters"),
    [
        (RobertaModel, ROBERTA, {"add_pooling_layer": False}, 102_144),
        (GPT2LMHeadModel, GPT3, {}, 96 * BLOCK + 12288),
    ],
    ids=["roberta-base", "gpt3-175b"],
)
def test_trained_parameters_are_those_of_the_formula(kind: type, config, options: dict, parameters: int) -> None:
    with torch.device("meta"):
        model = kind(config, **options)
        lk.attach(model, BitFit())
    assert lk.summary(model).trainable_parameters == parameters
    if config is GPT3:
        assert parameters == 12_988_416


@pytest.mark.parametrize("family", ["gpt2", "bert", "opt", "deberta-v2"])
def test_it_is_ordinary_training_of_the_biases(family: str) -> None:
    plain, model = tiny(family), tiny(family)
    lk.attach(model, BitFit(), name="a")
    biases = {name: p for name, p in plain.named_parameters() if name.endswith("bias")}
    for each, parameters in ((plain, list(biases.values())), (model, lk.parameters(model))):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for seed in range(3):
            each(tokens(model, seed=seed))[0].pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    ours = {key.replace(".bias.bias", ".bias"): value for key, value in adapter_tensors(model, "a").items()}
    assert ours.keys() == biases.keys()
    assert all(close(ours[name], value, 1e-4) for name, value in biases.items())
    assert close(output(model), output(plain), 1e-4)


def test_targets_keep_some_biases() -> None:
    model = tiny("bert")
    for number, (targets, paths) in enumerate(
        {
            "attn.q,mlp.up": {"attention.self.query", "intermediate.dense"},  # the paper's smaller variant
            "norm.mlp": {"output.LayerNorm"},
            "attention.output": {"attention.output.dense", "attention.output.LayerNorm"},
        }.items()
    ):
        lk.attach(model, BitFit(targets=targets), name=str(number))
        plan = attached_to(model, str(number)).plan
        assert {placement.path.partition("layer.")[2][2:] for placement in plan} == paths
        assert len(plan) == 2 * len(paths)


@pytest.mark.parametrize(
    ("family", "targets", "error", "words"),
    [
        ("llama", (), BadMethod, "LlamaForCausalLM has no bias to train"),
        ("gpt2", "attn.q", BadMethod, "part of transformer.h.0.attn.c_attn, whose bias is trained as one"),
        ("gpt2", "attn.qkv,embed", BadMethod, "'embed' names no module"),
        ("gpt2", "attn.quarry", NoSuchTarget, "attn.q"),
    ],
)
def test_what_has_no_bias_is_refused(family: str, targets: object, error: type, words: str) -> None:
    model = tiny(family)
    with pytest.raises(error, match=words):
        lk.attach(model, BitFit(targets=targets))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_bias_that_a_module_holds_for_its_layer_is_trained_once(family: str) -> None:
    """Language-model heads of encoders hold the bias of their last layer a second time."""
    model: nn.Module = AutoModelForMaskedLM.from_config(tiny(family).config).eval()
    lk.attach(model, BitFit(), name="a")
    assert len({placement.path for placement in attached_to(model, "a").plan if "decoder" in placement.path}) == 1
    scramble(model, "a")
    attached = output(model)
    lk.merge(model, "a")
    assert close(output(model), attached)


def test_biases_inside_a_module_are_named_and_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lorakit"):
        lk.attach(tiny("deberta"), BitFit())
        lk.attach(tiny("bert"), BitFit())
    (said,) = caplog.messages
    assert "4 biases" in said and "encoder.layer.0.attention.self.q_bias" in said

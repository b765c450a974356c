"""Roles, groups and globs find the right modules: in known families, and by inference in unknown ones."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

import lorakit as lk
from lorakit.core.sites import ATTENTION, MLP, Family, Site, Slice, family_of, resolve, sites_of
from lorakit.errors import NoSuchTarget
from tests.laws.cases import close, output, scramble
from tests.tiny import DECODERS, tiny

LAYERS = 2
LLAMA = {
    **{"block": "", "attn": "self_attn", "mlp": "mlp"},
    **{f"attn.{one}": f"self_attn.{one}_proj" for one in "qkvo"},
    **{f"mlp.{one}": f"mlp.{one}_proj" for one in ("gate", "up", "down")},
    **{"norm.attn": "input_layernorm", "norm.mlp": "post_attention_layernorm"},
}
GPT2 = {
    **{"block": "", "attn": "attn", "mlp": "mlp"},
    **dict.fromkeys(("attn.q", "attn.k", "attn.v", "attn.qkv"), "attn.c_attn"),
    **{"attn.o": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"},
    **{"norm.attn": "ln_1", "norm.mlp": "ln_2"},
}
BERT = {
    **{"block": "", "attn": "attention", "attn.o": "attention.output.dense"},
    **{f"attn.{one[0]}": f"attention.self.{one}" for one in ("query", "key", "value")},
    **{"mlp.up": "intermediate.dense", "mlp.down": "output.dense"},
    **{"norm.attn": "attention.output.LayerNorm", "norm.mlp": "output.LayerNorm"},
}
KNOWN = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), ("model.layers", LLAMA)),
    "gpt2": ("transformer.h", GPT2),
    **dict.fromkeys(("bert", "roberta"), ("encoder.layer", BERT)),
}
ENDS = {"llama": ("model.embed_tokens", "lm_head"), "gpt2": ("transformer.wte", "lm_head")}


def paths(model: nn.Module, role: str) -> list[str]:
    return [site.path for site in sites_of(model) if site.role == role]


def named(model: nn.Module, *targets: str) -> list[tuple[str, str]]:
    return [(site.path, site.role) for site in resolve(model, targets)]


def per_role(sites: list[Site]) -> Counter[str]:
    return Counter(site.role for site in sites)


# --- known families


@pytest.mark.parametrize("family", KNOWN)
def test_each_role_names_one_module_a_layer(family: str) -> None:
    model = tiny(family)
    block, inside = KNOWN[family]
    for role, tail in inside.items():
        expected = [".".join(filter(None, (block, str(layer), tail))) for layer in range(LAYERS)]
        assert paths(model, role) == expected, role
    assert {site.role for site in sites_of(model)} - {"embed", "head"} == set(inside)


@pytest.mark.parametrize("family", KNOWN)
def test_embed_and_head_are_outside_the_blocks(family: str) -> None:
    model = tiny(family)
    embed, head = ENDS.get("llama" if family in DECODERS and family != "gpt2" else family, (None, None))
    assert paths(model, "embed") == [embed or "embeddings.word_embeddings"]
    assert paths(model, "head") == ([head] if head else [])


def test_the_head_of_a_classifier() -> None:
    assert paths(tiny("bert", labels=2), "head") == ["classifier"]
    assert paths(tiny("roberta", labels=2), "head") == ["classifier"]


@pytest.mark.parametrize("family", KNOWN)
def test_groups_are_their_roles_and_linear_leaves_embed_and_head_alone(family: str) -> None:
    model = tiny(family)
    mlp = [role for role in MLP if paths(model, role)]
    assert per_role(resolve(model, ["attention"])) == dict.fromkeys(ATTENTION, LAYERS)
    assert per_role(resolve(model, ["mlp"])) == dict.fromkeys(mlp, LAYERS)
    assert per_role(resolve(model, ["linear"])) == dict.fromkeys([*ATTENTION, *mlp], LAYERS)
    assert resolve(model, ["attention", "mlp"]) == resolve(model, ["linear", "attn.q"])  # each site once, in order


def test_the_slices_of_a_fused_layer_are_its_thirds() -> None:
    model = tiny("gpt2")
    width = model.config.hidden_size
    sites = {site.role: site for site in sites_of(model) if site.path == "transformer.h.0.attn.c_attn"}
    assert [sites[f"attn.{one}"].slice for one in "qkv"] == [Slice(n * width, width, 3 * width) for n in range(3)]
    assert [sites[f"attn.{one}"].out_features for one in "qkv"] == [width] * 3
    assert sites["attn.qkv"].slice is None
    assert sites["attn.qkv"].out_features == 3 * width


@pytest.mark.parametrize(
    ("family", "target", "found"),
    [
        ("llama", "q_proj", [(f"model.layers.{n}.self_attn.q_proj", "attn.q") for n in range(LAYERS)]),
        ("llama", "*.q_proj", [(f"model.layers.{n}.self_attn.q_proj", "attn.q") for n in range(LAYERS)]),
        ("llama", "layers.1.*.[qv]_proj", [(f"model.layers.1.self_attn.{one}_proj", f"attn.{one}") for one in "qv"]),
        ("llama", "model.layers.0.mlp.up_proj", [("model.layers.0.mlp.up_proj", "mlp.up")]),
        ("gpt2", "h.1.attn.c_attn", [("transformer.h.1.attn.c_attn", "attn.qkv")]),
        ("roberta", "embeddings.token_type_embeddings", [("embeddings.token_type_embeddings", "other")]),
    ],
)
def test_globs_match_the_ends_of_paths(family: str, target: str, found: list[tuple[str, str]]) -> None:
    assert named(tiny(family), target) == found


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("attn.qq", "did you mean attn.q"),
        ("*.qproj", "q_proj"),
        ("attn.qkv", "attn.q"),
        ("proj", "q_proj"),
        ("", "There is"),
    ],
)
def test_a_target_that_matches_nothing_is_an_error_with_the_nearest_names(target: str, words: str) -> None:
    with pytest.raises(NoSuchTarget, match=words):
        resolve(tiny("llama"), ["attn.q", target])


def test_adapters_are_not_sites() -> None:
    model = tiny("llama")
    before = sites_of(model)
    lk.attach(model, lk.LoRA(targets="linear"))
    assert sites_of(model) == before
    assert len(resolve(model, ["*"])) == len([path for path, _ in tiny("llama").named_modules() if path])


# --- slices


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize(("start", "size", "stride"), [(0, 2, 6), (2, 2, 6), (4, 2, 6), (1, 3, 5), (0, 6, 6)])
def test_put_is_the_inverse_of_take(dim: int, count: int, start: int, size: int, stride: int) -> None:
    part, shape = Slice(start, size, stride, count), [3, 4, 2]
    shape[dim] = stride * count
    whole = torch.randn(shape)
    taken, new = part.take(whole, dim), torch.randn_like(part.take(whole, dim))
    assert taken.shape[dim] == part.width
    assert torch.equal(part.put(whole, taken, dim), whole)
    assert torch.equal(part.take(part.put(whole, new, dim), dim), new)
    units = [n * stride + start + i for n in range(count) for i in range(size)]
    assert torch.equal(taken, whole.index_select(dim, torch.tensor(units)))
    others = torch.tensor([unit for unit in range(stride * count) if unit not in units], dtype=torch.int64)
    assert torch.equal(part.put(whole, new, dim).index_select(dim, others), whole.index_select(dim, others))


def test_slices_that_cover_a_layer_put_it_together_again() -> None:
    whole_BO, heads = torch.randn(2, 24), 4
    thirds = [Slice(2 * number, 2, 6, heads) for number in range(3)]
    again_BO = torch.zeros_like(whole_BO)
    for third in thirds:
        again_BO = third.put(again_BO, third.take(whole_BO))
    assert torch.equal(again_BO, whole_BO)


def test_gradients_pass_through_take_and_put() -> None:
    whole = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    new = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    third = Slice(2, 2, 6)
    assert torch.autograd.gradcheck(lambda whole, new: third.put(whole, new * third.take(whole)), (whole, new))


# --- inference by pattern

SIZES = {
    **dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4),
    **dict(max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2),
}
GPT_SIZES = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64)
QKVO = {f"attn.{one}": f"self_attn.{one}_proj" for one in "qkv"}
UNKNOWN: dict[str, tuple[Any, dict[str, Any], dict[str, str | tuple[str, ...]]]] = {
    "opt": (
        AutoModelForCausalLM,
        dict(ffn_dim=48, word_embed_proj_dim=32),
        {**QKVO, "attn.o": "self_attn.out_proj", "mlp.up": "fc1", "mlp.down": "fc2", "attn": "self_attn"},
    ),
    "gpt_neox": (
        AutoModelForCausalLM,
        {},
        {
            **{"attn.qkv": "attention.query_key_value", "attn.o": "attention.dense"},
            **{"mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h", "attn": "attention", "mlp": "mlp"},
        },
    ),
    "phi3": (
        AutoModelForCausalLM,
        dict(num_key_value_heads=2),
        {
            **{"attn.qkv": "self_attn.qkv_proj", "attn.o": "self_attn.o_proj"},
            **{"mlp.gate_up": "mlp.gate_up_proj", "mlp.down": "mlp.down_proj", "attn": "self_attn", "mlp": "mlp"},
        },
    ),
    "phi": (
        AutoModelForCausalLM,
        {},
        {**QKVO, "attn.o": "self_attn.dense", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"},
    ),
    "gptj": (
        AutoModelForCausalLM,
        GPT_SIZES | dict(rotary_dim=4),
        {
            **{f"attn.{one}": f"attn.{one}_proj" for one in "qkv"},
            **{"attn.o": "attn.out_proj", "mlp.up": "mlp.fc_in", "mlp.down": "mlp.fc_out"},
        },
    ),
    "gpt_bigcode": (
        AutoModelForCausalLM,
        GPT_SIZES,
        {"attn.qkv": "attn.c_attn", "attn.o": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"},
    ),
    "distilbert": (
        AutoModel,
        dict(dim=32, hidden_dim=48, n_layers=2, n_heads=4),
        {
            **{f"attn.{one}": f"attention.{one}_lin" for one in "qkv"},
            **{"attn.o": "attention.out_lin", "mlp.up": "ffn.lin1", "mlp.down": "ffn.lin2", "mlp": "ffn"},
        },
    ),
    "mpnet": (
        AutoModel,
        {},
        {
            **{f"attn.{one}": f"attention.attn.{one}" for one in "qkvo"},
            **{"mlp.up": "intermediate.dense", "mlp.down": "output.dense", "norm.mlp": "output.LayerNorm"},
        },
    ),
    "modernbert": (
        AutoModel,
        {},
        {"attn.qkv": "attn.Wqkv", "attn.o": "attn.Wo", "mlp.gate_up": "mlp.Wi", "mlp.down": "mlp.Wo", "mlp": "mlp"},
    ),
    "albert": (
        AutoModel,
        dict(embedding_size=16, num_hidden_groups=2),
        {
            **{f"attn.{one[0]}": f"albert_layers.0.attention.{one}" for one in ("query", "key", "value")},
            **{"attn.o": "albert_layers.0.attention.dense", "mlp.up": "albert_layers.0.ffn"},
            **{"mlp.down": "albert_layers.0.ffn_output", "attn": "albert_layers.0.attention"},
        },
    ),
    "t5": (
        AutoModelForSeq2SeqLM,
        dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
        {
            **{f"attn.{one}": (f"layer.0.SelfAttention.{one}", f"layer.1.EncDecAttention.{one}") for one in "qkvo"},
            **{
                f"mlp.{role}": (f"layer.1.DenseReluDense.{name}", f"layer.2.DenseReluDense.{name}")
                for role, name in (("up", "wi"), ("down", "wo"))
            },
            **{"attn": ("layer.0.SelfAttention", "layer.1.EncDecAttention")},
        },
    ),
    "bart": (
        AutoModelForSeq2SeqLM,
        {
            **dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48),
            **dict(encoder_attention_heads=4, decoder_attention_heads=4),
        },
        {
            **{f"attn.{one}": (f"self_attn.{one}_proj", f"encoder_attn.{one}_proj") for one in "qkv"},
            **{"attn.o": ("self_attn.out_proj", "encoder_attn.out_proj"), "mlp.up": "fc1", "mlp.down": "fc2"},
        },
    ),
}
SHARED = ("t5", "bart")  # encoder and decoder have blocks of the same name


def unknown(name: str) -> PreTrainedModel:
    """A model whose type has no record, or is made to look so."""
    kind, sizes, _ = UNKNOWN[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind.from_config(AutoConfig.for_model(name, **(SIZES | sizes))).eval()
    model.config.model_type = "unheard-of"
    return model


@pytest.mark.parametrize("name", UNKNOWN)
def test_inference_finds_every_linear_layer_of_every_block(name: str) -> None:
    model, expected = unknown(name), UNKNOWN[name][2]
    family = family_of(model)
    assert family.model_types == ()
    assert {role: family.inside.get(role) for role in expected} == expected
    blocks = paths(model, "block")
    assert len(blocks) == LAYERS * (2 if name in SHARED else 1)
    linear = {site.path for site in resolve(model, ["linear"])}
    every = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linear == {path for path in every if path.startswith(tuple(f"{block}." for block in blocks))}
    attention = {path for path in linear if any("att" in part.lower() for part in path.split(".")[2:])}
    assert {site.path for site in resolve(model, ["attention"])} == attention
    assert {site.path for site in resolve(model, ["mlp"])} == linear - attention


@pytest.mark.parametrize("name", UNKNOWN)
def test_inference_finds_the_embedding_and_the_head(name: str) -> None:
    model = unknown(name)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert [model.get_submodule(path) for path in paths(model, "embed")] == [embeddings]
    assert [model.get_submodule(path) for path in paths(model, "head")] == ([] if head is None else [head])


@pytest.mark.parametrize("name", [name for name in UNKNOWN if name not in SHARED])
def test_an_adapter_on_every_linear_layer_of_an_unknown_model_acts_and_merges(name: str) -> None:
    model = unknown(name)
    before = output(model)
    lk.attach(model, lk.LoRA(rank=2, targets="linear"), name="a")
    assert torch.equal(output(model), before)
    scramble(model, "a")
    attached = output(model)
    assert not close(attached, before, 1e-3)
    assert lk.summary(model).adapters[0].resting == ()
    lk.merge(model, "a")
    assert close(output(model), attached)
    lk.unmerge(model)
    with lk.use(model, None):
        assert torch.equal(output(model), before)


def test_layers_apart_from_the_attentions_are_found() -> None:
    sizes = dict(vocab_size=64, emb_dim=32, n_layers=2, n_heads=4, max_position_embeddings=64)
    model = AutoModel.from_config(AutoConfig.for_model("xlm", **sizes))
    assert paths(model, "attn.q") == [f"attentions.{layer}.q_lin" for layer in range(LAYERS)]
    assert paths(model, "mlp.up") == [f"ffns.{layer}.lin1" for layer in range(LAYERS)]


def test_what_is_no_attention_is_not_taken_for_one() -> None:
    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes))
    with pytest.raises(NoSuchTarget, match="There is: "):
        resolve(model, ["attn.o"])
    assert len(resolve(model, ["mixer.in_proj"])) == LAYERS


def test_a_model_without_blocks_has_globs() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert sites_of(model) == []
    assert named(model, "2") == [("2", "other")]
    assert isinstance(family_of(model), Family)

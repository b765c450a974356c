"""Each family's record names the right layers, parts of layers and facts; the models themselves are the oracles.

Legend: B batch, T tokens, I in, O out, H heads, D units of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.core import registry
from lorakit.core.sites import Family, Site, family_of, resolve, sites_of, unbatched
from lorakit.core.state import adapter_tensors
from lorakit.errors import BadMethod, BadRouting
from tests.laws.cases import close, scramble
from tests.tiny import ENCODERS, FAMILIES, KIN, VISION, inputs, tiny

LAYERS, WIDTH, INNER, WORDS = 2, 32, 48, 64
RECORDS: dict[str, Family] = {
    name: registry.find("lorakit.families", name).FAMILY
    for name in registry.names("lorakit.families")
    if name != "infer"
}
TYPES = [kind for record in RECORDS.values() for kind in record.model_types]
WITHOUT_ROLE = (  # DeBERTa's layers of positions, and a gate of one unit
    *("pos_proj.weight", "pos_q_proj.weight", "pos_key_proj.weight", "pos_query_proj.weight"),
    "shared_expert_gate.weight",
)
UNSHARED = ("deberta-v2", {"share_att_key": False})
every_family = pytest.mark.parametrize("family", FAMILIES)
every_type = pytest.mark.parametrize("family", TYPES)
every_projection = pytest.mark.parametrize("role", ["attn.q", "attn.k", "attn.v"])


@torch.no_grad()  # with gradients, the kernel that PyTorch's attention takes depends on what is frozen
def run(model: PreTrainedModel, **size: int) -> Tensor:
    return model(**inputs(model, **size))[0]


def by_role(model: nn.Module) -> dict[str, list[Site]]:
    found: dict[str, list[Site]] = {}
    for site in sites_of(model):
        found.setdefault(site.role, []).append(site)
    return found


# --- roles


def widths(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """(out, in) of every role in a tiny model, from its config."""
    heads, kept = model.config.num_attention_heads, getattr(model.config, "num_key_value_heads", None)
    keys = (kept or heads) * 8
    square = {"attn.q": (WIDTH, WIDTH), "attn.o": (WIDTH, WIDTH)} | dict.fromkeys(("attn.k", "attn.v"), (keys, WIDTH))
    inner = dict.fromkeys(("mlp.gate", "mlp.up"), (INNER, WIDTH)) | {"mlp.down": (WIDTH, INNER)}
    return square | inner | {"attn.qkv": (WIDTH + 2 * keys, WIDTH), "mlp.gate_up": (2 * INNER, WIDTH)}


@pytest.mark.parametrize(
    ("family", "size"), [*((family, {}) for family in TYPES), ("t5", {"feed_forward_proj": "relu"})]
)
def test_every_role_is_found_in_each_layer_with_the_right_shape(family: str, size: dict[str, Any]) -> None:
    model = tiny(family, **size)
    found, record = by_role(model), family_of(model)
    assert model.config.model_type in record.model_types
    assert set(found) - {"block", "embed", "head"} == set(record.inside) - absent(model)
    for role, sites in found.items():
        stacks = 1 if not model.config.is_encoder_decoder else 3 if role.startswith(("attn", "norm.attn")) else 2
        both = role.startswith("norm.") and isinstance(record.inside[role], tuple)
        shared = hasattr(model.config, "shared_expert_intermediate_size") and role in ("mlp.gate", "mlp.up", "mlp.down")
        pair = 2 if both or shared else 1
        assert len(sites) == (1 if role in ("embed", "head") else LAYERS * stacks * pair), role
        for site in sites:
            check_shape(model, site)


def absent(model: PreTrainedModel) -> set[str]:
    """Roles of the record that this model has no modules for: T5's first version has no gate."""
    return set() if getattr(model.config, "is_gated_act", True) else {"mlp.gate"}


def shape_of(model: PreTrainedModel, site: Site) -> tuple[int, ...]:
    """(out, in) of a layer's site, (experts, out, in) of stacked experts'."""
    weight = model.get_submodule(site.path).get_parameter(site.parameter)
    matrix = site.experts.matrices(weight) if site.experts else site.layout.matrix(weight)
    return tuple((site.slice.take(matrix, -2) if site.slice else matrix).shape)


def check_shape(model: PreTrainedModel, site: Site) -> None:
    module, expected = model.get_submodule(site.path), widths(model)
    if site.role in expected:
        matrix = site.experts or site.layout
        assert shape_of(model, site)[-2:] == expected[site.role] == (site.out_features, matrix.in_features)
    elif site.role.startswith("norm."):
        assert module.weight.shape == (WIDTH,)
    elif site.role == "embed":
        assert module.weight.shape == ((WIDTH, 3, 4, 4) if model.main_input_name == "pixel_values" else (WORDS, WIDTH))
    elif site.role == "head":
        assert module.weight.shape == (WORDS, WIDTH)
    else:  # block, attn, mlp: what holds the layers
        held = {"attn": ("attn.",), "mlp": ("mlp.",), "block": ("attn.", "mlp.")}[site.role]
        below = {each.role for each in sites_of(model) if each.path.startswith(f"{site.path}.") and each.has_matrix}
        assert below == {role for role in expected if role.startswith(held)} & set(by_role(model))


@every_type
def test_linear_is_every_linear_layer_of_the_blocks_and_no_other(family: str) -> None:
    model = tiny(family)
    blocks = tuple(f"{site.path}." for site in by_role(model)["block"])
    every = {f"{p}.weight" for p, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    every |= {path for path, parameter in model.named_parameters() if parameter.dim() == 3}  # of stacked experts
    every = {path for path in every if path.startswith(blocks) and not path.endswith(WITHOUT_ROLE)}
    sites = resolve(model, ["linear"])
    assert {f"{site.path}.{site.parameter}" for site in sites} == every
    units = sum(math.prod(shape_of(model, site)) for site in sites)
    assert units == sum(model.get_parameter(path).numel() for path in every)  # no part of a layer twice or never


@every_family
def test_inference_agrees_with_the_record_on_every_role_that_it_finds(family: str) -> None:
    model = tiny(family)
    known = by_role(model)
    model.config.model_type = "unheard-of"
    inferred = by_role(model)
    assert family_of(model).model_types == ()
    for role, sites in inferred.items():
        assert [site.path for site in sites] == [site.path for site in known[role]], role
    unsliced = {role for role, sites in known.items() if all(site.slice is None for site in sites)}
    untold = {"norm.attn", "norm.mlp"} if family == "t5" else set()  # all of T5's norms have the same name
    assert set(inferred) == unsliced - untold


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "t5"])
def test_the_head_of_a_classifier(family: str) -> None:
    model = tiny(family, labels=3)
    heads = [site.path for site in by_role(model).get("head", [])]
    assert heads == (["classifier"] if family in ENCODERS + VISION else [])


# --- q, k and v


@pytest.fixture
def seen() -> Iterator[dict[str, Tensor]]:
    """What the first attention of a forward is given: query, key and value."""
    first: dict[str, Tensor] = {}

    def spy(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not first:
            first.update(q=query.detach().clone(), k=key.detach().clone(), v=value.detach().clone())
        return import_module(type(module).__module__).eager_attention_forward(
            module, query, key, value, *args, **kwargs
        )

    AttentionInterface.register("spy", spy)
    yield first
    del ALL_ATTENTION_FUNCTIONS._global_mapping["spy"]


OWN_ATTENTION = ("gptj", "deberta", "deberta-v2")  # these never ask for an attention function


@every_projection
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in OWN_ATTENTION])
def test_an_adapter_changes_what_attention_gets_of_its_role_and_nothing_else(
    family: str, role: str, seen: dict[str, Tensor]
) -> None:
    model = tiny(family)
    model.set_attn_implementation("spy")
    run(model)
    base = dict(seen)
    lk.attach(model, lk.LoRA(rank=2, targets=(role,)), name="a")
    scramble(model, "a")
    seen.clear()
    run(model)
    changed_BHT = {one: (seen[one] - base[one]).abs().amax(-1) for one in "qkv"}
    assert {one for one, change in changed_BHT.items() if change.any()} == {role[-1]}
    assert changed_BHT[role[-1]].all()  # every head of every token


@every_projection
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in VISION])
def test_where_there_is_one_token_values_alone_matter(family: str, role: str) -> None:
    model = tiny(family)
    before = run(model, length=1)
    lk.attach(model, lk.LoRA(rank=2, targets=(role,)), name="a")
    scramble(model, "a", std=0.3)
    assert close(run(model, length=1), before, 1e-5) is (role != "attn.v")
    assert not close(run(model, length=7), before[:, :1], 1e-3)


def gpt2_rows(weight: Tensor, number: int) -> Tensor:
    return weight.T.view(3, WIDTH, WIDTH)[number]


def interleaved_rows(weight: Tensor, number: int) -> Tensor:
    return weight.view(4, 3, 8, WIDTH)[:, number]


def phi3_rows(weight: Tensor, number: int) -> Tensor:
    return weight.split([32, 16, 16])[number]


ROWS: dict[str, Callable[[Tensor, int], Tensor]] = {  # views of the fused weight, as the model's forward divides it
    **{"gpt2": gpt2_rows, "phi3": phi3_rows},
    **dict.fromkeys(("gpt_neox", "deberta"), interleaved_rows),
}


@every_projection
@pytest.mark.parametrize("family", ROWS)
def test_an_adapter_on_a_part_is_an_edit_of_that_part_s_rows(family: str, role: str) -> None:
    model, edited = tiny(family), tiny(family)
    lk.attach(model, lk.LoRA(rank=2, alpha=6, targets=(role,)), name="a")
    scramble(model, "a")
    tensors = list(adapter_tensors(model, "a").values())
    for site, a_RI, b_OR in zip(resolve(model, [role]), tensors[::2], tensors[1::2], strict=True):
        rows = ROWS[family](edited.get_submodule(site.path).weight.data, "qkv".index(role[-1]))
        rows += (3 * b_OR.detach() @ a_RI.detach()).view_as(rows)
    assert not close(run(edited), run(tiny(family)), 1e-3)
    assert close(run(model), run(edited))
    lk.merge(model, "a")
    assert all(close(value, model.get_parameter(path)) for path, value in edited.named_parameters())


@pytest.mark.parametrize("role", ["mlp.gate", "mlp.up"])
def test_gate_and_up_of_a_fused_layer(role: str) -> None:
    """With the gate's weight at zero the whole feed-forward part is silent, whatever `up` is."""
    model = tiny("phi3")
    for site in by_role(model)["mlp.gate"]:
        model.get_submodule(site.path).weight.data[:INNER] = 0
    before = run(model)
    lk.attach(model, lk.LoRA(rank=2, targets=(role,)), name="a")
    scramble(model, "a", std=0.3)
    assert close(run(model), before, 1e-6) is (role == "mlp.up")


def test_a_config_that_is_not_the_model_s_is_refused() -> None:
    model = tiny("gpt_neox")
    model.config.num_attention_heads = 5
    with pytest.raises(BadMethod, match=r"has 96 output units.*5 times 1\+1\+1"):
        lk.attach(model, lk.LoRA(targets=("attn.q",)))


# --- adapters on every linear layer


@every_type
def test_an_adapter_on_every_linear_layer_acts_and_merges(family: str) -> None:
    model = tiny(family)
    before = run(model)
    lk.attach(model, lk.LoRA(rank=2, targets="linear"), name="a")
    assert torch.equal(run(model), before)
    scramble(model, "a")
    attached = run(model)
    assert not close(attached, before, 1e-3)
    assert lk.summary(model).adapters[0].resting == ()
    lk.merge(model, "a")
    assert close(run(model), attached)
    lk.unmerge(model)
    with lk.use(model, None):
        assert torch.equal(run(model), before)


# --- facts of the records


Calls = dict[str, list[tuple[Tensor, Tensor]]]


def calls(model: PreTrainedModel, paths: Iterable[str], **size: int) -> Calls:
    """What these modules read and return in one forward, call by call."""
    found: Calls = {}

    def note(path: str, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        found.setdefault(path, []).append((x, output[0] if isinstance(output, tuple) else output))

    hooks = [model.get_submodule(p).register_forward_hook(partial(note, p), with_kwargs=True) for p in paths]
    run(model, **size)
    for hook in hooks:
        hook.remove()
    return found


def same(one: Tensor, other: Tensor) -> bool:
    return one.numel() == other.numel() and torch.equal(one.flatten(), other.flatten())  # OPT flattens rows and tokens


OPT_350M = ("opt", {"do_layer_norm_before": False})


@pytest.mark.parametrize(("family", "size"), [*((family, {}) for family in FAMILIES), OPT_350M])
def test_norms_stand_by_the_half_of_the_block_that_their_role_names(family: str, size: dict[str, Any]) -> None:
    """Before or after its layers; where norms follow additions, the first begins the second half, the last ends it."""
    model = tiny(family, **size)
    record, found = family_of(model), by_role(model)
    norms = [site for site in sites_of(model) if site.role.startswith("norm.")]
    linear = [site for site in sites_of(model) if site.has_matrix and site.role not in ("embed", "head")]
    seen = calls(model, {site.path for site in [*norms, *linear, *found["block"]]})
    for norm in norms:
        x, y = seen[norm.path][0]
        block = next(site.path for site in found["block"] if norm.path.startswith(f"{site.path}."))
        near = [site for site in linear if same(seen[site.path][0][0], y) or same(seen[site.path][0][1], x)]
        halves = {site.role.split(".")[0] for site in near if site.path.startswith(f"{block}.")}
        ends = same(seen[block][0][1], y)
        if record.post_norm:
            assert (halves, ends) == (({"mlp"}, False) if norm.role == "norm.attn" else (set(), True))
        else:
            alone = "norm.mlp" not in record.inside
            assert (halves, ends) == ({"attn", "mlp"} if alone else {norm.role.removeprefix("norm.")}, False)


@pytest.mark.parametrize(
    ("family", "size"),
    [
        *((family, {}) for family in FAMILIES),
        ("bert", {"is_decoder": True}),
        *((family, {"use_bidirectional_attention": True}) for family in ("gemma", "gemma3_text")),
    ],
)
def test_a_token_sees_those_after_it_where_the_record_says_so(family: str, size: dict[str, Any]) -> None:
    model = tiny(family, **size)
    given = inputs(model)
    name = model.main_input_name
    other = {name: given[name].clone()}
    other[name][..., -1] = 3 if name == "input_ids" else 5.0
    given[name][..., -1] = 4 if name == "input_ids" else -5.0
    block = by_role(model)["block"][LAYERS - 1].path  # T5's encoder comes first
    states: list[Tensor] = []
    hook = model.get_submodule(block).register_forward_hook(
        lambda module, args, output: states.append(output[0] if isinstance(output, tuple) else output)
    )
    for each in (given, given | other):
        model(**each)
    hook.remove()
    assert torch.equal(states[0][:, 0], states[1][:, 0]) is not family_of(model).bidirectional


@every_family
def test_encoders_with_a_class_token_keep_it_first(family: str) -> None:
    assert family_of(tiny(family)).leading == (1 if family in ENCODERS + VISION else 0)


@pytest.mark.parametrize(("family", "size"), [*((family, {}) for family in FAMILIES), UNSHARED])
def test_layers_that_do_not_see_the_batch_are_named(family: str, size: dict[str, Any]) -> None:
    """Or all they ever see has a first dimension of 1, which no batch of several rows can be taken for."""
    rows, model = 3, tiny(family, **size)
    own = [path for path, module in model.named_modules() if module._parameters]
    firsts = {path: {y.shape[0] for _, y in each} for path, each in calls(model, own, rows=rows).items()}
    named = set(unbatched(model, own))
    assert {path for path, sizes in firsts.items() if sizes not in ({rows}, {1})} <= named
    assert named <= {path for path, sizes in firsts.items() if sizes != {rows}}


def test_layers_are_named_with_the_reason() -> None:
    model = tiny("opt")
    paths = ["model.decoder.layers.0.fc1", "model.decoder.final_layer_norm", "model.decoder.layers.1.final_layer_norm"]
    assert list(unbatched(model, paths)) == [paths[0], paths[2]]
    assert "one list" in unbatched(model, paths)[paths[0]]
    assert unbatched(nn.Linear(2, 2), ["fc1"]) == {}


@pytest.mark.parametrize("role", ["attn.q", "attn.k"])
def test_shared_position_projections_refuse_rows(role: str) -> None:
    model = with_adapters("deberta-v2", role)
    with pytest.raises(BadRouting), lk.use(model, ["a", "b", None]):
        run(model)


@pytest.mark.parametrize(("family", "size"), [("deberta-v2", {}), UNSHARED, ("deberta", {})])
def test_other_layers_of_deberta_take_rows(family: str, size: dict[str, Any]) -> None:
    shared = family == "deberta-v2" and not size
    model = with_adapters(family, "attn.v,attn.o,mlp" if shared else "linear", **size)
    with lk.use(model, ["a", "b", None]):
        mixed = run(model)
    for number, name in enumerate(("a", "b", None)):
        with lk.use(model, name):
            assert close(mixed[number], run(model)[number])


def with_adapters(family: str, targets: str, **size: Any) -> PreTrainedModel:
    model = tiny(family, **size)
    for number, name in enumerate("ab"):
        lk.attach(model, lk.LoRA(rank=2, targets=targets), name=name)
        scramble(model, name, seed=number)
    return model


# --- sizes of GPT-3


@pytest.mark.parametrize(
    ("family", "size"),
    [
        ("gpt_neox", dict(hidden_size=12288, num_hidden_layers=96, num_attention_heads=96, intermediate_size=49152)),
        ("gptj", dict(n_embd=12288, n_layer=96, n_head=96)),
    ],
)
def test_parameters_at_the_size_of_gpt3(family: str, size: dict[str, int]) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **size))
        lk.attach(model, lk.LoRA(rank=1, targets=("attn.q", "attn.v")))
    assert lk.summary(model).trainable_parameters == 4_718_592 == 2 * 96 * 2 * 12288


def test_every_tiny_model_is_of_a_family_with_a_record() -> None:
    assert {*FAMILIES, *KIN} == set(TYPES)
    assert len(TYPES) == len(set(TYPES))


def test_an_unknown_encoder_is_known_by_its_attentions() -> None:
    encoder = DistilBertModel(DistilBertConfig(vocab_size=64, dim=32, hidden_dim=48, n_layers=2, n_heads=4))
    infer = registry.find("lorakit.families", "infer").infer
    assert (infer(encoder).bidirectional, infer(encoder).leading) == (True, 1)
    assert not infer(tiny("llama")).bidirectional

"""Stacked experts: an adapter on them is W_e + s B_e A_e for every expert, by whichever way the model computes them.

Legend: E experts, I in, O out, R rank.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import lorakit as lk
from lorakit.core.method import method_names
from lorakit.core.sites import resolve, sites_of
from lorakit.core.state import adapter_tensors, attached_to, idle
from lorakit.errors import BadMethod, BadRouting
from tests.laws.cases import bits, close, output, same_bits, scramble
from tests.tiny import tiny, tokens

EXPERTS, INNER, RANK, ALPHA = 4, 48, 3, 6.0
WAYS = ("eager", "grouped_mm", "batched_mm")
FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
UNLISTED = {  # families without a record, and what their configs call our sizes
    "gpt_oss": {"num_local_experts": EXPERTS, "head_dim": 8},  # transposed, with biases, gate and up in turn
    "flex_olmo": {"num_experts": EXPERTS},
}
ROWS = {"mlp.gate": slice(0, INNER), "mlp.up": slice(INNER, 2 * INNER)}  # of an expert's matrix, as forward divides it
every_way = pytest.mark.parametrize("way", WAYS)
every_family = pytest.mark.parametrize("family", [*FAMILIES, *UNLISTED])


def mixture(family: str, way: str = "grouped_mm", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny mixture of experts that computes them in one way."""
    model = tiny(family, dtype) if family in FAMILIES else unlisted(family, dtype)
    model.set_experts_implementation(way)
    return model


def unlisted(family: str, dtype: torch.dtype) -> PreTrainedModel:
    like = tiny("mixtral").config.to_dict()
    own = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    size = {key: like[key] for key in (*own, "num_key_value_heads", "num_experts_per_tok", "initializer_range")}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, pad_token_id=0, **size, **UNLISTED[family])
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def adapted(
    family: str, way: str = "grouped_mm", targets: str = "mlp.gate_up,mlp.down", **fields: Any
) -> PreTrainedModel:
    """A mixture of experts with one trained-looking adapter on them."""
    model = mixture(family, way)
    lk.attach(model, lk.LoRA(rank=RANK, alpha=ALPHA, targets=targets, **fields), name="a")
    scramble(model, "a")
    return model


def formed(model: PreTrainedModel, factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with s B_e A_e added to each expert, one after another."""
    weights = {name: value.detach() for name, value in model.named_parameters() if ".adapters." not in name}
    for site in resolve(model, attached_to(model, "a").method.targets):
        slot = f"{site.path}.{site.role.replace('.', '_')}"
        a, b, name = factors[f"{slot}.A"], factors[f"{slot}.B"], f"{site.path}.{site.parameter}"
        if not site.experts:
            weights[name] = weights[name] + ALPHA / RANK * b @ a
            continue
        matrices = list(weights[name].mT if site.experts.transposed else weights[name])
        for number in range(EXPERTS):
            change = torch.zeros_like(matrices[number])
            change[ROWS.get(site.role, slice(None))] = ALPHA / RANK * b[number] @ a[number]
            matrices[number] = matrices[number] + change
        stack = torch.stack(matrices)
        weights[name] = stack.mT if site.experts.transposed else stack
    return weights


# --- the law


def check_output(family: str, way: str, targets: str) -> None:
    model, plain = adapted(family, way, targets), mixture(family, way)
    with torch.no_grad():
        expected = functional_call(plain, formed(model, adapter_tensors(model, "a")), tokens(model))[0]
        assert close(output(model), expected), targets
        assert not close(expected, output(plain), 1e-3), targets


@every_way
@every_family
@pytest.mark.parametrize("targets", ["mlp.gate_up", "mlp.down", "mlp.gate_up,mlp.down"])
def test_the_output_is_that_of_the_formed_weights(family: str, way: str, targets: str) -> None:
    check_output(family, way, targets)


@every_way
@pytest.mark.parametrize("targets", ["mlp.gate", "mlp.up", "mlp", "linear"])
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_the_experts_are_sites_of_their_own(family: str, targets: str, way: str) -> None:
    check_output(family, way, targets)


@every_way
@every_family
def test_gradients_are_those_of_the_formed_weights(family: str, way: str) -> None:
    model, plain = adapted(family, way), mixture(family, way)
    embeddings = model.get_input_embeddings()(tokens(model)).detach()
    given = [embeddings.clone().requires_grad_() for _ in range(2)]
    model(inputs_embeds=given[0]).logits.pow(2).sum().backward()
    factors = {name: value.detach().clone().requires_grad_() for name, value in adapter_tensors(model, "a").items()}
    weights = formed(model, factors)
    functional_call(plain, weights, (), {"inputs_embeds": given[1]}).logits.pow(2).sum().backward()
    assert close(given[0].grad, given[1].grad, 1e-4)
    for name, value in adapter_tensors(model, "a").items():
        assert close(value.grad, factors[name].grad, 1e-4), name
    assert not any(value.grad is not None for name, value in model.named_parameters() if ".adapters." not in name)


@every_way
@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_a_fresh_adapter_is_the_base_to_the_bit(init: str, dtype: torch.dtype, family: str, way: str) -> None:
    model = mixture(family, way, dtype)
    with torch.no_grad():
        before = output(model)
        lk.attach(model, lk.LoRA(rank=2, targets="linear", init=init))
        assert torch.equal(output(model), before)


@every_way
def test_bf16_errs_at_most_twice_as_much_as_the_plain_model(way: str) -> None:
    model = adapted("mixtral", way, "linear").to(torch.bfloat16)
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("batched_mm")
    error = {}
    for name in ("a", None):
        with lk.use(model, name), lk.use(exact, name), torch.no_grad():
            error[name] = float((output(model).double() - output(exact)).norm() / output(exact).norm())
    assert error["a"] <= 2 * error[None]


@every_way
def test_autocast_runs_experts_in_its_dtype_and_trains_the_masters(way: str) -> None:
    model = adapted("mixtral", way)
    exact = output(model)
    with torch.autocast("cpu", torch.bfloat16):
        cast = output(model)
    assert close(cast.float(), exact, 0.1)
    cast.float().pow(2).sum().backward()
    assert all(p.grad.dtype is torch.float32 and p.grad.isfinite().all() for p in lk.parameters(model))


@every_way
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(reentrant: bool, way: str) -> None:
    model, ids = adapted("mixtral", way).train(), tokens(tiny("mixtral"))
    found = []
    for kind in (None, {"use_reentrant": reentrant}):
        if kind:
            model.gradient_checkpointing_enable(kind)
            model.enable_input_require_grads()
        model.zero_grad()
        model(ids).logits.pow(2).sum().backward()
        found.append([p.grad.clone() for p in lk.parameters(model)])
    assert all(close(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["a", {"a": 0.7, "b": -0.4}], ids=["one", "mixture"])
@pytest.mark.parametrize(
    ("way", "dtype", "fullgraph"),
    [
        ("grouped_mm", torch.float32, True),
        ("batched_mm", torch.float32, True),
        ("batched_mm", torch.bfloat16, True),
        ("eager", torch.float32, False),  # its loop breaks the graph, whatever is attached
    ],
)
def test_it_compiles_where_the_model_does(way: str, dtype: torch.dtype, what: Any, *, fullgraph: bool) -> None:
    torch._dynamo.reset()
    model = adapted("mixtral", way, "linear")
    lk.attach(model, lk.LoRA(rank=2, targets="mlp.down"), name="b")
    scramble(model, "b", seed=1)
    model.to(dtype)
    with lk.use(model, what), torch.no_grad():
        compiled = torch.compile(model, fullgraph=fullgraph, backend="aot_eager")
        assert close(compiled(tokens(model)).logits, output(model), 1e-5 if dtype is torch.float32 else 0.05)


@pytest.mark.slow
def test_grouped_bf16_products_do_not_compile_and_never_lose_the_adapter() -> None:
    """torch.compile takes PyTorch's own grouped product as it is, and finds that the stand-in has no values."""
    torch._dynamo.reset()
    model = adapted("mixtral", "grouped_mm").to(torch.bfloat16)
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(Exception, match="meta"):
        compiled(tokens(model))
    with lk.use(model, None):
        compiled(tokens(model))


def test_dropout_acts_on_the_updates_input_alone() -> None:
    model = adapted("mixtral", dropout=0.9)
    steady = output(model)
    assert torch.equal(output(model), steady)
    assert not torch.equal(output(model.train()), steady)
    with lk.use(model, None):
        base = output(model)
    lk.attach(model, lk.LoRA(rank=2, targets="mlp", dropout=0.9))
    assert torch.equal(output(model), base)


@every_way
def test_copies_carry_adapters_along(way: str) -> None:
    model = adapted("mixtral", way)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin), output(model))


# --- mixtures, rows, idle experts, errors


@every_way
@every_family
def test_merged_equals_attached_and_unmerge_gives_every_bit_back(family: str, way: str) -> None:
    model = adapted(family, way, "linear")
    lk.attach(model, lk.LoRA(rank=2, targets="mlp.down", init="pissa"), name="b")
    scramble(model, "b", seed=1)
    before = bits(model)
    for what in ("a", "b", {"a": 0.7, "b": -0.4}, {"a": 1.0}):
        with lk.use(model, what):
            attached = output(model)
        lk.merge(model, what)
        assert isinstance(model.get_parameter(f"{experts_path(model)}.down_proj"), nn.Parameter)
        assert close(output(model), attached), what
        lk.unmerge(model)
        assert same_bits(bits(model), before)


def experts_path(model: PreTrainedModel) -> str:
    return next(site.path for site in sites_of(model) if site.experts)


def test_experts_refuse_rows_and_other_layers_still_take_them() -> None:
    model = adapted("mixtral", targets="mlp.down")
    for number, name in enumerate("bc"):
        lk.attach(model, lk.LoRA(rank=2, targets="attention"), name=name)
        scramble(model, name, seed=number)
    with pytest.raises(BadRouting, match="tokens of all rows as one list; leave it out of the targets"):
        lk.use(model, ["a", None, "b"])
    with lk.use(model, ["b", None, "c"]):
        mixed = output(model)
    for number, name in enumerate(("b", None, "c")):
        with lk.use(model, name):
            assert close(mixed[number], output(model)[number])
    unknown = adapted("gpt_oss", targets="mlp.down")
    with pytest.raises(BadRouting, match="has to be the same for all rows"):
        lk.use(unknown, ["a", None])


@every_way
def test_experts_without_a_token_rest(way: str, tmp_path: Path) -> None:
    model = adapted("mixtral", way)
    model(tokens(model, rows=1, length=1)).logits.pow(2).sum().backward()
    for value in lk.parameters(model):
        used = value.grad.flatten(1).abs().amax(1) > 0
        assert int(used.sum()) == 2  # of four
    assert idle(model, "a") == []
    lk.save(model, "a", tmp_path / "a")


class Stop(BaseException):
    """Not an Exception, such as Ctrl-C."""


@pytest.mark.parametrize("error", [ValueError, Stop])
@pytest.mark.parametrize("then", ["adapter", "base", "merge", "detach"])
def test_an_interrupted_forward_leaves_the_base_as_it_was(then: str, error: type[BaseException]) -> None:
    model = adapted("mixtral")
    expected, experts = output(model), model.get_submodule(experts_path(model))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(experts.act_fn, "forward", lambda x: (_ for _ in ()).throw(error))
        with pytest.raises(error):
            output(model)
    if then == "adapter":
        assert torch.equal(output(model), expected)
    elif then == "merge":
        lk.merge(model, "a")
        assert close(output(model), expected)
        lk.unmerge(model)
    elif then == "detach":
        lk.detach(model, "a")
    with lk.use(model, None) if then != "detach" else nullcontext():
        assert torch.equal(output(model), output(mixture("mixtral")))
    assert all(type(value) is nn.Parameter for value in experts._parameters.values())


@pytest.fixture
def odd_way() -> Iterator[str]:
    def forward(self: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("ti,eoi->to", x, self.gate_up_proj)[:, : x.shape[1]]

    ALL_EXPERTS_FUNCTIONS.register("odd", forward)
    yield "odd"
    del ALL_EXPERTS_FUNCTIONS._global_mapping["odd"]


def test_a_way_of_computing_that_the_stand_in_does_not_know_is_refused(odd_way: str) -> None:
    model = adapted("mixtral")
    model.config._experts_implementation = odd_way
    with pytest.raises(BadMethod, match=r"layers.0.mlp.experts computes its experts by einsum.*grouped_mm.*merge"):
        output(model)
    with lk.use(model, None):
        output(model)
    lk.merge(model, "a")
    output(model)


# --- what is adapted


def test_sites_and_ranks_of_experts() -> None:
    model = mixture("mixtral")
    ranks = {"mlp.up": 2, "mlp.down": 5}
    lk.attach(model, lk.LoRA(rank=RANK, targets="linear", ranks=ranks, alphas={"mlp.up": 1.0}), name="a")
    plan = [place for place in attached_to(model, "a").plan if place.path == experts_path(model)]
    assert [(p.role, p.parameter, p.rank, p.alpha) for p in plan] == [
        ("mlp.gate", "gate_up_proj", RANK, 16.0),
        ("mlp.up", "gate_up_proj", 2, 1.0),
        ("mlp.down", "down_proj", 5, 16.0),
    ]
    assert "4 x 48 x 32" in str(lk.summary(model))
    own = sum(EXPERTS * rank * (32 + INNER) for rank in (RANK, 2, 5)) * 2
    attention = RANK * 2 * (2 * (32 + 32) + 2 * (32 + 16))
    assert lk.summary(model).trainable_parameters == own + attention


def test_experts_are_targets_by_role_path_and_parameter() -> None:
    model = mixture("mixtral")
    for target, parameters in {
        "mlp.down": {"down_proj"},
        "experts.down_proj": {"down_proj"},
        "model.layers.1.mlp.experts.gate_up_proj": {"gate_up_proj"},
        "*.experts": {"gate_up_proj", "down_proj"},
        "mlp.gate_up@layers.0.mlp.experts": {"gate_up_proj"},
    }.items():
        sites = resolve(model, [target])
        assert {site.parameter for site in sites} == parameters, target
        assert len(sites) == len(parameters) * (1 if ".0." in target or ".1." in target else 2)


@pytest.mark.parametrize("name", method_names())
def test_whoever_cannot_adapt_experts_says_so(name: str) -> None:
    kind, preset = method_names()[name]
    if "targets" not in kind.__dataclass_fields__ or name == "lora":
        return
    model = mixture("qwen2_moe")  # its attention has biases
    before = bits(model)
    with pytest.raises(BadMethod, match=r"experts|Experts|no module"):
        lk.attach(model, kind.of_fields({**preset, "targets": ("mlp.down",)}))
    assert same_bits(bits(model), before)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(targets="linear", init="covariance-eva"), "starts from statistics, which stacked experts"),
        (dict(targets="mlp.down", rank=33), r"rank 33 is above the matrix of .*experts \(32 x 48\)"),
        (dict(targets="attn.q", train="mlp.experts"), "names the stacked experts"),
        (dict(targets="attn.q", train="layers.1"), "names the stacked experts"),
    ],
)
def test_what_experts_cannot_have_is_refused_before_anything_changes(fields: dict[str, Any], words: str) -> None:
    model = mixture("mixtral")
    before = bits(model)
    with pytest.raises(BadMethod, match=words):
        lk.attach(model, lk.LoRA(**fields), statistics={})
    assert same_bits(bits(model), before)

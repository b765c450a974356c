"""Bottleneck adapters: the published formulas by hand, the published counts, and layers that are left out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

import lorakit as lk
from lorakit.core.attach import new_deltas
from lorakit.core.method import Method, named
from lorakit.core.plan import Placement
from lorakit.core.state import adapter_tensors, attached_to, deltas_of
from lorakit.errors import BadMethod, LorakitError, NoSuchAdapter
from lorakit.methods.bottleneck import Bottleneck
from tests.core.test_counts import MODELS
from tests.laws.cases import bits, close, output, same_bits, scramble
from tests.methods.by_hand import PATHS, Change, agrees, nothing, trained
from tests.tiny import tiny

families = pytest.mark.parametrize("family", ["gpt2", "bert"])


def dense(tensors: dict[str, Tensor], prefix: str, activation: Change) -> Change:
    """W_up f(W_down y + b) + b', in double precision."""
    own = {key.removeprefix(prefix): value.detach().double() for key, value in tensors.items() if prefix in key}
    return lambda y: activation(y @ own["down.weight"].T + own["down.bias"]) @ own["up.weight"].T + own["up.bias"]


@families
def test_houlsby_is_the_published_formula(family: str) -> None:
    model, tensors = trained(family, Bottleneck.houlsby(size=5))

    def at(number: int, role: str) -> Change:
        if role not in ("attn.o", "mlp.down"):
            return nothing
        f = dense(tensors, PATHS[family, role].format(number), F.silu)
        return lambda y: y + f(y)

    assert agrees(family, model, at)


@families
def test_lin_is_the_published_formula(family: str) -> None:
    model, tensors = trained(family, Bottleneck.lin(size=5))

    def at(number: int, role: str) -> Change:
        if role != "block":
            return nothing
        prefix = PATHS[family, role].format(number)
        f = dense(tensors, prefix, F.relu)
        weight, bias = (tensors[f"{prefix}norm.{key}"].detach().double() for key in ("weight", "bias"))

        def change(y: Tensor) -> Tensor:
            centred = y - y.mean(-1, keepdim=True)
            normed = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
            return y + f(normed * weight + bias)

        return change

    assert agrees(family, model, at)


def test_pfeiffer_uses_the_last_norm_twice_where_norms_come_last() -> None:
    """z = LN(u + x); a = f(z) + u; out = LN(a + x), with u + x the norm's input."""
    model, tensors = trained("bert", Bottleneck.pfeiffer(size=5))

    def at(number: int, role: str) -> Change:
        if role != "norm.mlp":
            return nothing
        f = dense(tensors, PATHS["bert", role].format(number), F.relu)
        return lambda z, s: f(z) + s

    assert agrees("bert", model, at)


def test_pfeiffer_adds_to_the_residual_stream_where_norms_come_first() -> None:
    model, tensors = trained("gpt2", Bottleneck.pfeiffer(size=5))

    def at(number: int, role: str) -> Change:
        f = dense(tensors, PATHS["gpt2", "block"].format(number), F.relu)
        return (lambda z: z + f(z)) if role == "block" else nothing

    assert agrees("gpt2", model, at)


ROWS = [
    *(("gpt3-175b", Bottleneck.houlsby(size=r), n) for r, n in ((1, 7_078_080), (4, 21_234_432), (8, 40_109_568))),
    *(("gpt3-175b", Bottleneck.houlsby(size=r), n) for r, n in ((16, 77_859_840), (64, 304_361_472))),
    *(("roberta-large", Bottleneck.pfeiffer(size=r), n) for r, n in ((16, 811_392), (64, 3_171_840))),
    *(("roberta-large", Bottleneck.houlsby(size=r), n) for r, n in ((8, 835_968), (64, 6_343_680))),
    *(("gpt2-medium", Bottleneck.lin(size=r), n) for r, n in ((6, 368_784), (224, 11_089_152))),
    *(("gpt2-large", Bottleneck.lin(size=r), n) for r, n in ((8, 875_808), (248, 23_002_848))),
    *(("gpt2-medium", Bottleneck.lin(size=r, own_norm=False), n) for r, n in ((7, 368_808), (225, 11_089_176))),
    *(("gpt2-large", Bottleneck.lin(size=r, own_norm=False), n) for r, n in ((9, 875_844), (249, 23_002_884))),
    ("gpt2-medium", Bottleneck.houlsby(size=112), 11_064_576),
    ("roberta-base", Bottleneck.dropped(size=16, drop=0), 304_320),
    ("roberta-base", Bottleneck.dropped(size=48, drop=8), 298_176),
    ("roberta-base", Bottleneck.dropped(size=48, drop=0), 894_528),
]


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    with torch.device("meta"):
        return {name: kind(config) for name, (kind, config) in MODELS.items()}


@pytest.mark.parametrize(("name", "method", "parameters"), ROWS)
def test_trained_parameters_are_those_of_the_papers_tables(
    models: dict[str, PreTrainedModel], name: str, method: Method, parameters: int
) -> None:
    model = models[name]
    with torch.device("meta"):
        lk.attach(model, method)
    counted = lk.summary(model).trainable_parameters
    lk.detach(model, "default")
    assert counted == parameters


def test_presets_are_named_constructors() -> None:
    for preset, fields in Bottleneck.presets.items():
        kind, values = named(preset)
        assert kind is Bottleneck
        assert getattr(Bottleneck, preset.replace("-", "_"))() == kind.of_fields(dict(values)) == Bottleneck(**fields)
    assert Bottleneck.pfeiffer(size=3, activation="gelu").to_json()["activation"] == "gelu"


@pytest.mark.parametrize(("method", "std", "most"), [("houlsby", 0.0088, 0.02), ("pfeiffer", 0.02, 0.2)])
def test_projections_start_as_the_papers_say(method: str, std: float, most: float) -> None:
    """A normal of deviation 0.01 cut at two deviations has deviation 0.0088."""
    torch.manual_seed(0)
    model = tiny("gpt2", hidden_size=128)
    lk.attach(model, getattr(Bottleneck, method)(size=64))
    tensors = adapter_tensors(model, "default")
    weights = torch.cat([value.detach().flatten() for key, value in tensors.items() if key.endswith("weight")])
    assert abs(float(weights.std()) - std) < 0.02 * std
    assert float(weights.abs().max()) <= most
    assert not any(value.any() for key, value in tensors.items() if key.endswith("bias"))


def test_a_norm_of_its_own_starts_as_an_identity() -> None:
    model = tiny("gpt2")
    lk.attach(model, Bottleneck.lin())
    tensors = adapter_tensors(model, "default")
    assert all(bool((value == 1).all()) for key, value in tensors.items() if key.endswith("norm.weight"))


@pytest.mark.parametrize("preset", ["houlsby", "lin", "pfeiffer"])
def test_a_fresh_adapter_is_near_the_base(preset: str) -> None:
    torch.manual_seed(0)
    for family in ("bert", "gpt2", "t5"):
        model = tiny(family)
        before = output(model)
        lk.attach(model, getattr(Bottleneck, preset)())
        assert close(output(model), before, 0.05)


def test_cross_attention_gets_no_adapter() -> None:
    model = tiny("t5")
    lk.attach(model, Bottleneck.houlsby())
    paths = {placement.path for placement in attached_to(model, "default").plan}
    assert paths == {path for path, _ in model.named_modules() if path.endswith(("SelfAttention.o", ".wo"))}
    assert len(paths) == 8


def test_norms_are_trained_on_request_even_where_another_adapter_sits_on_them() -> None:
    model = tiny("bert")
    norms = {path for path, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    lk.attach(model, Bottleneck.pfeiffer(), name="a")
    lk.attach(model, Bottleneck.houlsby(train_norms=True), name="b")
    assert {placement.path for placement in attached_to(model, "b").plan if placement.is_replaced} == norms


def places(model: PreTrainedModel, name: str = "default") -> list[str]:
    return [placement.path for placement in attached_to(model, name).plan]


def test_dropped_blocks_have_no_adapter() -> None:
    model = tiny("bert", num_hidden_layers=4)
    lk.attach(model, Bottleneck.dropped(drop=3))
    assert places(model) == ["encoder.layer.3.output.LayerNorm"]
    model = tiny("t5")
    lk.attach(model, Bottleneck.dropped(drop=1))
    assert places(model) == ["encoder.block.1", "decoder.block.1"]
    model = tiny("gpt2")
    lk.attach(model, Bottleneck.houlsby(drop=1))
    assert places(model) == ["transformer.h.1.attn.c_proj", "transformer.h.1.mlp.c_proj"]


def acting(model: PreTrainedModel) -> list[int]:
    """The depths at which the adapter does arithmetic in one forward pass."""
    calls: list[int] = []
    handles = [
        delta.down.register_forward_hook(lambda *_, depth=delta.depth: calls.append(depth))
        for delta in deltas_of(model, "default")
    ]
    output(model)
    for handle in handles:
        handle.remove()
    return calls


def test_a_random_number_of_blocks_is_left_out_of_each_training_step() -> None:
    model, method = tiny("gpt2", num_hidden_layers=4), Bottleneck.dropped(drop=1, drop_most=3)
    lk.attach(model, method)
    deltas = deltas_of(model, "default")
    seen: list[list[int]] = []
    for step in range(1, 41):
        method.before_step(deltas, step, 40)
        seen.append(acting(model.train()))
        assert acting(model.eval()) == [1, 2, 3]  # inference leaves out `drop`
    numbers = [seen.count(list(range(first, 4))) for first in range(4)]
    assert sum(numbers) == 40
    assert min(numbers) >= 4
    again = Bottleneck.from_json(method.to_json())
    for step in (40, 17):  # as after a resume: the number is a function of seed and step
        again.before_step(deltas, step, 40)
        assert acting(model.train()) == seen[step - 1]
    other = Bottleneck.dropped(drop=1, drop_most=3, seed=1)
    found = []
    for step in range(1, 41):
        other.before_step(deltas, step, 40)
        found.append(acting(model))
    assert found != seen


def test_what_is_left_out_gets_no_gradient_and_is_not_taken_for_broken() -> None:
    model, method = tiny("gpt2"), Bottleneck.dropped(drop=0, drop_most=1, seed=0)
    lk.attach(model, method)
    deltas = deltas_of(model, "default")
    step = next(step for step in range(1, 20) if _left_out(method, deltas, step))
    method.before_step(deltas, step, 20)
    output(model.train()).pow(2).mean().backward()
    assert [delta.may_rest for delta in deltas] == [True, False]
    assert [all(p.grad is not None for p in delta.parameters()) for delta in deltas] == [False, True]


def _left_out(method: Bottleneck, deltas: list, step: int) -> bool:
    method.before_step(deltas, step, 20)
    return deltas[0].rests_in_training


def test_inference_can_leave_out_blocks_of_any_adapter() -> None:
    model = tiny("bert", num_hidden_layers=3)
    lk.attach(model, Bottleneck.houlsby())
    scramble(model, "default")
    whole = output(model)
    Bottleneck.leave_out(model, "default", 2)
    assert acting(model) == [2, 2]
    assert not close(output(model), whole, 1e-3)
    tensors = {key: value for key, value in adapter_tensors(model, "default").items() if "layer.2" in key}
    other = tiny("bert", num_hidden_layers=3)
    lk.attach(other, Bottleneck.houlsby(drop=2))
    with torch.no_grad():
        for key, value in adapter_tensors(other, "default").items():
            value.copy_(tensors[key])
    assert torch.equal(output(other), output(model))  # as if they had never been there
    Bottleneck.leave_out(model, "default", 0)
    assert torch.equal(output(model), whole)


def test_what_cannot_be_left_out_is_refused() -> None:
    model = tiny("bert", num_hidden_layers=3)
    lk.attach(model, Bottleneck.pfeiffer(), name="a")
    lk.attach(model, lk.LoRA(), name="b")
    for blocks in (-1, 3):
        with pytest.raises(BadMethod, match="takes 0 to 2 blocks"):
            Bottleneck.leave_out(model, "a", blocks)
    with pytest.raises(BadMethod, match="'b' has no bottlenecks"):
        Bottleneck.leave_out(model, "b", 1)
    with pytest.raises(NoSuchAdapter):
        Bottleneck.leave_out(model, "c", 1)


@pytest.mark.parametrize(
    ("family", "method", "words"),
    [
        ("bert", Bottleneck.pfeiffer(train_norms=True), "train_norms is not possible"),
        ("bert", Bottleneck.pfeiffer(train="norm.mlp"), "trained whole at once"),
        ("gpt2", Bottleneck.dropped(drop=2), "drop=2 leaves no adapter: the model has 2 blocks; take 1 at most"),
        ("gpt2", Bottleneck.dropped(drop_most=2), "drop_most=2 leaves no adapter"),
    ],
)
def test_what_a_model_cannot_hold_is_refused_before_anything_changes(family: str, method: Method, words: str) -> None:
    model = tiny(family)
    before, attributes = bits(model), set(vars(model))
    with pytest.raises(BadMethod, match=words):
        lk.attach(model, method)
    assert same_bits(bits(model), before)
    assert set(vars(model)) == attributes


class Mixer(nn.Module):
    """Blocks of which no name tells that there is an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"fc1": nn.Linear(4, 8), "fc2": nn.Linear(8, 4)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["fc2"](layer["fc1"](x).relu())
        return x


def test_a_model_without_the_place_is_refused_and_another_place_works() -> None:
    model, x = Mixer(), torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(BadMethod, match=r"act at attn\.o, which Mixer has not; take another place; .*mlp\.down"):
        lk.attach(model, Bottleneck.houlsby())
    with pytest.raises(BadMethod, match="Mixer has no norms to train"):
        lk.attach(model, Bottleneck(place="mlp", train_norms=True))
    before = model(x)
    lk.attach(model, Bottleneck(place="mlp", size=2))
    scramble(model, "default")
    assert places(model) == ["layers.0.fc2", "layers.1.fc2"]
    assert not close(model(x), before, 1e-3)


@pytest.mark.parametrize(
    "fields",
    [
        dict(size=0),
        dict(size=2.5),
        dict(size="8"),
        dict(place="attn"),
        dict(activation="tanh"),
        dict(init="zero"),
        dict(kronecker=-1),
        dict(size=6, kronecker=4),
        dict(drop=-1),
        dict(drop_most=1.5),
        dict(seed="x"),
    ],
)
def test_hyperparameters_are_checked_where_they_are_written(fields: dict) -> None:
    with pytest.raises(LorakitError, match=f"{next(iter(fields))}="):
        Bottleneck(**fields)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("encoder.layer.0.output.dense", "bottleneck-around-norm"),
        ("encoder.layer.0", "bottleneck-around-norm"),
        ("encoder.layer.0.output.LayerNorm", "bottleneck"),
        ("embeddings.word_embeddings", "bottleneck"),
    ],
)
def test_a_plan_that_puts_an_adapter_where_none_can_be_is_refused(path: str, kind: str) -> None:
    """Such a plan comes out of a file."""
    plan = (Placement(path, "block", kind, rank=2),)
    with pytest.raises(BadMethod, match=f"{path}, a .* cannot hold a {kind}: it is no"):
        new_deltas(tiny("bert"), Bottleneck(), plan)

"""(IA)³ against PEFT, and against its formula in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import IA3Config
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorakit as lk
from lorakit.core.state import deltas_of
from lorakit.errors import BadAdapterFile, BadMethod, NoSuchTarget
from lorakit.methods.ia3 import IA3, ScaledInput
from tests.laws.cases import close, output, scramble
from tests.methods.oracle import goes_both_ways, loaded, read_by_peft, steps_agree, written_by_peft
from tests.tiny import tiny

pytestmark = pytest.mark.filterwarnings("ignore")
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", dict(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "outputs": ("llama", dict(target_modules=["q_proj", "up_proj"], feedforward_modules=[])),
    "inputs": ("llama", dict(target_modules=["up_proj", "o_proj"], feedforward_modules=["up_proj", "o_proj"])),
    "patterns": ("llama", dict(target_modules=r".*(k_proj|down_proj)", feedforward_modules=r".*layers\.0.*down_proj")),
    "gpt2": ("gpt2", dict(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"])),
    "bert": ("bert", dict(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"])),
    "defaults": ("roberta", dict()),
}


def _attached(family: str = "llama", **fields: Any) -> nn.Module:
    model = tiny(family)
    lk.attach(model, IA3(**fields), name="a")
    scramble(model, "a", std=0.2)
    return model


@pytest.mark.parametrize("case", CONFIGS)
def test_files_go_both_ways(case: str, tmp_path: Path) -> None:
    family, fields = CONFIGS[case]
    goes_both_ways(family, IA3Config(**fields), tmp_path)


@pytest.mark.parametrize("case", ["llama", "gpt2", "bert"])
def test_five_steps_agree_with_peft(case: str, tmp_path: Path) -> None:
    family, fields = CONFIGS[case]
    steps_agree(family, IA3Config(**fields), tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "gpt_neox", "phi3", "t5"])
@pytest.mark.parametrize("targets", ["attn.k,attn.v", "attn.q"])
def test_peft_reads_slices_as_one_vector_with_ones(family: str, targets: str, tmp_path: Path) -> None:
    model = _attached(family, targets=targets)
    lk.save(model, "a", tmp_path / "a")
    theirs, ours = read_by_peft(family, tmp_path / "a"), loaded(family, tmp_path / "a")
    given = dict(input_ids=torch.tensor([[3, 4, 5]]))
    given |= dict(decoder_input_ids=torch.tensor([[3, 4]])) if family == "t5" else {}
    assert close(theirs(**given)[0], model(**given)[0])
    assert torch.equal(ours(**given)[0], model(**given)[0])


def test_rows_that_no_slice_has_stay_ones(tmp_path: Path) -> None:
    lk.save(_attached("gpt2"), "a", tmp_path / "a")
    vector_O1 = load_file(tmp_path / "a" / TENSORS)["base_model.model.transformer.h.0.attn.c_attn.ia3_l"]
    assert vector_O1.shape == (96, 1)
    assert bool((vector_O1[:32] == 1).all())
    assert not bool((vector_O1[32:] == 1).any())


def test_names_that_end_alike_are_told_apart(tmp_path: Path) -> None:
    """PEFT takes any module for feed-forward whose path ends like a name, as BERT's attention.output.dense does."""
    model = _attached("bert", targets="attn.o", inputs="mlp.down")
    lk.save(model, "a", tmp_path / "a")
    assert close(output(read_by_peft("bert", tmp_path / "a")), output(model))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "qwen2"])
def test_attached_and_merged_are_the_formula_in_float64(family: str) -> None:
    model, expected = _attached(family, targets="attn.k,attn.v,mlp.up"), {}
    for delta in deltas_of(model, "a"):
        weight_OI, bias_O = _own(model, delta)
        vector = delta.vector.detach().double()
        early = isinstance(delta, ScaledInput)
        x = torch.randn(5, delta.layout.in_features)
        told = F.linear(x * delta.vector, weight_OI, bias_O) if early else F.linear(x, weight_OI, bias_O) * delta.vector
        ours = F.linear(delta.before(x), weight_OI, bias_O)
        assert close(delta.after(x, ours), told)
        new = (weight_OI.double() * (vector if early else vector[:, None]), bias_O)
        bias = None if bias_O is None else bias_O.double() * (1 if early else vector)
        expected[delta.placement] = new[0], bias
    lk.merge(model, "a")
    for delta in deltas_of(model, "a"):
        weight_OI, bias_O = expected[delta.placement]
        merged_OI, merged_O = _own(model, delta)
        assert close(merged_OI.double(), weight_OI, 1e-6)
        assert bias_O is None or close(merged_O.double(), bias_O, 1e-6)


def _own(model: nn.Module, delta: Any) -> tuple[Tensor, Tensor | None]:
    module, part = model.get_submodule(delta.placement.path), delta.placement.slice
    weight_OI, bias_O = delta.layout.matrix(module.weight.detach()), module.bias
    if part is None:
        return weight_OI.clone(), None if bias_O is None else bias_O.detach().clone()
    return part.take(weight_OI, 0).clone(), None if bias_O is None else part.take(bias_O.detach()).clone()


def test_defaults_scale_keys_values_and_the_second_feed_forward_matrix() -> None:
    model = tiny("llama")
    lk.attach(model, IA3(), name="a")
    roles = {delta.placement.role: (delta.placement.kind, len(delta.vector)) for delta in deltas_of(model, "a")}
    assert roles == {"attn.k": ("scaled-output", 16), "attn.v": ("scaled-output", 16), "mlp.down": ("scaled-input", 48)}
    assert all(bool((delta.vector == 1).all()) for delta in deltas_of(model, "a"))
    assert sum(p.numel() for p in lk.parameters(model)) == 2 * (16 + 16 + 48)


def test_a_layer_that_both_name_gets_its_input_scaled() -> None:
    one, other = tiny("llama"), tiny("llama")
    lk.attach(one, IA3(targets="attn.k,attn.v,mlp.down"), name="a")
    lk.attach(other, IA3(), name="a")
    assert [delta.placement for delta in deltas_of(one, "a")] == [delta.placement for delta in deltas_of(other, "a")]


@pytest.mark.parametrize(
    ("family", "fields", "error", "words"),
    [
        (
            "gpt2",
            dict(inputs="attn.q"),
            BadMethod,
            "cannot scale the input of attn.q alone: .*c_attn holds other roles",
        ),
        ("llama", dict(inputs="mlp.x"), NoSuchTarget, "matches the target 'mlp.x'"),
        ("llama", dict(targets="embed"), BadMethod, "ia3 needs Linear or Conv1D layers, but 'embed' names Embedding"),
        ("llama", dict(inputs="norm.mlp"), BadMethod, "'norm.mlp' names LlamaRMSNorm"),
    ],
)
def test_places_that_cannot_be_scaled_are_refused(
    family: str, fields: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = tiny(family)
    with pytest.raises(error, match=words):
        lk.attach(model, IA3(**fields))
    assert not any(".adapters." in key for key in model.state_dict())


def test_nothing_to_scale_is_refused() -> None:
    with pytest.raises(BadMethod, match="at least one here or in inputs"):
        IA3(targets="", inputs="")
    lk.attach(tiny("llama"), IA3(targets=""))
    lk.attach(tiny("llama"), IA3(inputs=""))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, c: t.clear(), "no tensors that end in .ia3_l"),
        (lambda t, c: t.update({next(iter(t)): torch.ones(3, 1)}), r"ia3_l has shape \(3, 1\), the model needs"),
        (lambda t, c: t.update({next(iter(t)): torch.ones(())}), r"ia3_l has shape \(\), the model needs"),
        (lambda t, c: c.update(feedforward_modules=3), "bad feedforward_modules: 3"),
        (lambda t, c: t.update({"base_model.model.nowhere.ia3_l": torch.ones(3, 1)}), "nowhere"),
    ],
)
def test_a_bad_folder_is_refused(change: Any, words: str, tmp_path: Path) -> None:
    written_by_peft("llama", IA3Config(target_modules=["k_proj"], feedforward_modules=[]), tmp_path / "a")
    tensors, config = load_file(tmp_path / "a" / TENSORS), json.loads((tmp_path / "a" / CONFIG).read_text())
    change(tensors, config)
    save_file(tensors, tmp_path / "a" / TENSORS)
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(BadAdapterFile, match=words):
        lk.load(tiny("llama"), tmp_path / "a")

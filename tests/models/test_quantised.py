"""Over a base in 4 or 8 bits all is as over a float base whose weights are what the codes stand for."""

from __future__ import annotations

import copy
import logging
import pickle
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

import lorakit as lk
from lorakit import train
from lorakit.core import registry
from lorakit.core.layouts import layout_of
from lorakit.core.quantised import QuantisedLinear
from lorakit.core.sites import weight_at
from lorakit.core.state import deltas_of
from lorakit.errors import BadAdapterFile, BadMethod, BadModel, BadState, LorakitError, MissingPackage, NoSuchTarget
from lorakit.interop import merge_checkpoint
from lorakit.models import adopt, dequantise, load, quantise
from lorakit.models.quantise import Width, bitsandbytes, to_int4, to_int8
from lorakit.train.callback import FollowMethod, SaveAdapter
from tests.ecosystem.small import ADAPTER_FILES, files_in, only_the_adapter_learns
from tests.ecosystem.test_trainer import trainer
from tests.laws.cases import METHODS, VARIANTS, bits, close, output, same_bits, scramble, waived
from tests.tiny import tiny, tokens
from tests.train import small

ERRORS = {"int8": 0.012, "int4": 0.11}  # of normal weights, relative to their length
LORA = lk.LoRA(rank=4, targets="linear", init="gaussian")
pytestmark = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
every_width = pytest.mark.parametrize("width", ["int8", "int4"])
one_by_default = pytest.mark.parametrize("width", [pytest.param("int8", marks=pytest.mark.slow), "int4"])


def quantised(family: str, width: Width, dtype: torch.dtype = torch.float32, **size: Any) -> PreTrainedModel:
    model = tiny(family, dtype, **size)
    quantise(model, width)
    return model


def adapted(family: str, width: Width, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = quantised(family, width, dtype)
    lk.attach(model, LORA, name="a")
    scramble(model, "a")
    return model


def layers(model: nn.Module) -> dict[str, QuantisedLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantisedLinear)}


def error(one: Tensor, exact: Tensor) -> float:
    return float((one.double() - exact.double()).norm() / exact.double().norm())


@every_width
@pytest.mark.parametrize("shape", [(64, 64), (48, 32), (33, 35), (5, 3), (2, 1), (10, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_stand_for_almost_the_same_numbers(width: Width, shape: tuple[int, int], dtype: torch.dtype) -> None:
    w_OI = torch.randn(shape)
    w_OI[0, :] = 0
    packing, codes, parts = {"int8": to_int8, "int4": to_int4}[width](w_OI)
    found = packing.unpack(codes, tuple(parts.values()), dtype)
    assert (found.dtype, found.shape, codes.dtype) == (dtype, w_OI.shape, torch.int8)
    assert (found[0] == 0).all()
    assert error(found, w_OI) < ERRORS[width]
    exact = packing.unpack(codes, tuple(parts.values()), torch.float64)
    assert error(found, exact) < torch.finfo(dtype).eps


def test_int4_is_bitsandbytes_normal_float() -> None:
    w_OI = torch.randn(32, 128)
    packing, codes, parts = to_int4(w_OI)
    theirs, how = bitsandbytes().quantize_4bit(w_OI, blocksize=64, compress_statistics=True, quant_type="nf4")
    assert torch.equal(codes.view(torch.uint8), theirs.view(-1))
    assert torch.equal(
        packing.unpack(codes, tuple(parts.values()), torch.float32), bitsandbytes().dequantize_4bit(theirs, how)
    )


@every_width
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_and_gradient_are_those_of_the_unpacked_matrix(width: Width, dtype: torch.dtype) -> None:
    layer = next(iter(layers(quantised("gpt2", width, dtype)).values()))
    x = torch.randn(2, 5, layer.in_features, dtype=dtype, requires_grad=True)
    w_OI, upstream = weight_at(layer, None).double(), torch.randn(2, 5, layer.out_features)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    y.backward(upstream.to(dtype))
    assert y.dtype == dtype
    assert error(y.detach(), F.linear(x.detach().double(), w_OI, layer.bias.double())) < 4 * torch.finfo(dtype).eps
    assert x.grad is not None
    assert error(x.grad, upstream.to(dtype).double() @ w_OI) < 4 * torch.finfo(dtype).eps
    assert sum(tensor.nbytes for tensor in saved) < 1.5 * w_OI.numel()  # codes and scales, no float copy


@every_width
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "phi3", "t5"])
def test_the_layers_of_attention_and_mlps_are_quantised_and_no_others(family: str, width: Width) -> None:
    plain, model = tiny(family), quantised(family, width)
    found = layers(model)
    assert type(model) is type(plain)
    assert {path.rsplit(".", 1)[-1] for path in found}.isdisjoint({"lm_head", "dense_pooler", "wte"})
    assert len(found) == sum(
        type(module).__name__ in ("Linear", "Conv1D") and not path.endswith(("lm_head", "pooler.dense"))
        for path, module in plain.named_modules()
    )
    for path, module in plain.named_modules():
        if path in found:
            assert layout_of(found[path]) == layout_of(module)
            assert error(weight_at(found[path], None), weight_at(module, None)) < 2 * ERRORS[width]
    kept = {key: value for key, value in plain.state_dict().items() if key.rpartition(".")[0] not in found}
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in kept.items())
    assert error(output(model), output(plain)) < 10 * ERRORS[width]


@every_width
def test_numbers_and_bytes_are_counted(width: Width) -> None:
    model, plain = adapted("llama", width), tiny("llama")
    lk.attach(plain, LORA, name="a")
    told, usual = lk.summary(model), lk.summary(plain)
    assert told.base_parameters == usual.base_parameters
    inside = sum(layer.numbers for layer in layers(model).values())
    scales = sum(part.nbytes for layer in layers(model).values() for part in layer.parts())
    assert told.base_bytes == usual.base_bytes - 4 * inside + inside // (1 if width == "int8" else 2) + scales
    rows = usual.adapters[0].rows
    plain_rows = [(*row[:3], row[3].removesuffix(", fused"), row[4]) for row in rows]
    assert list(told.adapters[0].rows) == plain_rows  # a layer in few bits is not fused


@one_by_default
@pytest.mark.parametrize("name", [*METHODS, *VARIANTS])
def test_every_method_acts_and_merges_or_is_refused_in_a_sentence(name: str, width: Width) -> None:
    method = (METHODS | VARIANTS)[name]
    model = quantised("gpt2", width)
    with torch.no_grad():
        base, before = output(model), bits(model)
        if method.replaces_weights:
            with pytest.raises(BadMethod, match="cannot be trained; load the model without quantisation"):
                lk.attach(model, method, name="a")
            assert same_bits(bits(model), before)
            return
        lk.attach(model, method, name="a")
        assert waived(name, "fresh") or torch.equal(output(model), base)
        scramble(model, "a")
        acting = output(model)
    output(model).square().mean().backward()
    assert all(parameter.grad is not None for key, parameter in model.named_parameters() if parameter.requires_grad
               if not key.endswith((".unread", ".bias")))  # fmt: skip
    if not waived(name, "merge"):
        with torch.no_grad():
            lk.merge(model, "a")
            assert close(output(model), acting)
            lk.unmerge(model)
            assert torch.equal(output(model), acting)
    lk.detach(model, "a")
    assert same_bits(bits(model), before)


def test_a_quantised_layer_cannot_be_trained_whole() -> None:
    model = quantised("llama", "int8")
    with pytest.raises(BadMethod, match=r"down_proj is quantised, so it cannot be trained whole"):
        lk.attach(model, lk.LoRA(rank=2, train="mlp.down"))


@every_width
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_our_loop_trains_over_it_and_leaves_its_bits_alone(family: str, width: Width) -> None:
    model = quantised(family, width)
    lk.attach(model, LORA, name="a")
    before = {key: value for key, value in bits(model).items() if ".adapters." not in key}
    losses = [step.loss for step in train.run(model, small.feed(), small.SETTINGS, name="a")]
    assert losses[-1] < 0.9 * losses[0]
    after = {key: value for key, value in bits(model).items() if ".adapters." not in key}
    assert same_bits(after, before)


@one_by_default
def test_training_is_that_over_the_unpacked_base(width: Width) -> None:
    model, unpacked = quantised("llama", width), quantised("llama", width)
    dequantise(unpacked)
    for each in (model, unpacked):
        torch.manual_seed(0)
        lk.attach(each, LORA, name="a")
    one, other = (
        [step.loss for step in train.run(each, small.feed(), small.SETTINGS, name="a")] for each in (model, unpacked)
    )
    assert one == pytest.approx(other, rel=1e-5)


@one_by_default
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_the_trainer_of_transformers_trains_over_it(width: Width, tmp_path: Path) -> None:
    model = quantised("llama", width)
    lk.attach(model, LORA, name="a")
    with only_the_adapter_learns(model):
        trainer(model, tmp_path, SaveAdapter("a"), FollowMethod("a")).train()
    assert files_in(tmp_path) > ADAPTER_FILES


@every_width
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_saving_and_loading_change_nothing(
    family: str, width: Width, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted(family, width)
    lk.save(model, "a", tmp_path / "a")
    twin = quantised(family, width)
    with caplog.at_level(logging.WARNING):
        lk.load(twin, tmp_path / "a")
    assert torch.equal(output(twin), output(model))
    assert caplog.records == []
    with pytest.raises(BadAdapterFile, match="trained on another base"):
        lk.load(quantised(family, width, seed=1), tmp_path / "a", name="b")


@every_width
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_goes_from_a_quantised_base_to_a_float_one_and_back(
    family: str, width: Width, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    over_codes, over_floats = adapted(family, width), tiny(family)
    lk.attach(over_floats, LORA, name="b")
    lk.save(over_codes, "a", tmp_path / "a")
    lk.save(over_floats, "b", tmp_path / "b")
    lk.load(over_floats, tmp_path / "a")
    assert "only up to quantisation" in caplog.text
    assert error(output(over_floats), output(over_codes)) < 10 * ERRORS[width]
    caplog.clear()
    lk.load(over_codes, tmp_path / "b")
    assert "only up to quantisation" in caplog.text
    for name, other in {"a": tiny(family, seed=1), "b": quantised(family, width, seed=1)}.items():
        with pytest.raises(BadAdapterFile, match="trained on another base"):
            lk.load(other, tmp_path / name)


@every_width
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_adds_to_what_the_codes_stand_for(family: str, width: Width, dtype: torch.dtype) -> None:
    model = adapted(family, width, dtype)
    wanted = {path: expected(model, path) for path in layers(model)}
    acting, before = output(model), bits(model)
    lk.merge(model, "a")
    for path, layer in layers(model).items():
        assert layer.weight.dtype == dtype
        assert error(weight_at(layer, None), wanted[path]) < torch.finfo(dtype).eps
    assert not any(module._forward_hooks for module in model.modules())
    assert dtype is torch.bfloat16 or close(output(model), acting)
    lk.unmerge(model)
    assert same_bits(bits(model), before)
    assert torch.equal(output(model), acting)


def expected(model: nn.Module, path: str) -> Tensor:
    """W + s B A of one layer, in float64."""
    w_OI = weight_at(model.get_submodule(path), None).double()
    for delta in deltas_of(model, "a"):
        if delta.placement.path == path:
            change = delta.placement.scale * (delta.B.double() @ delta.A.double())  # type: ignore[operator, union-attr]
            part = delta.placement.slice
            w_OI = w_OI + change if part is None else part.put(w_OI, part.take(w_OI, 0) + change, 0)
    return w_OI


def test_merged_weights_would_lose_the_change_if_they_were_quantised_again() -> None:
    model = adapted("llama", "int4")
    path, layer = next(iter(layers(model).items()))
    before, after = weight_at(layer, None), expected(model, path).float()
    packing, codes, parts = to_int4(after)
    again = packing.unpack(codes, tuple(parts.values()), torch.float32)
    assert (again - after).norm() > 0.5 * (after - before).norm()


@every_width
def test_a_mixture_merges_too(width: Width) -> None:
    model = adapted("llama", width)
    lk.attach(model, LORA, name="b")
    scramble(model, "b", seed=1)
    before = bits(model)
    with lk.use(model, {"a": 0.7, "b": 0.4}):
        mixed = output(model)
    lk.merge(model, {"a": 0.7, "b": 0.4})
    assert close(output(model), mixed)
    lk.unmerge(model)
    assert same_bits(bits(model), before)


@pytest.fixture(scope="module")
def tokenizer_folder() -> Path:
    return registry.find("lorakit.models.packaged", "minilm-l6").model.path()


@pytest.fixture
def folder(tmp_path: Path, tokenizer_folder: Path) -> Path:
    """The files of a tiny Llama."""
    tiny("llama").save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@every_width
def test_an_adapter_merges_into_the_original_weights_on_disk(width: Width, folder: Path, tmp_path: Path) -> None:
    model = adapted("llama", width)
    lk.save(model, "a", tmp_path / "a")
    merge_checkpoint(folder, tmp_path / "a", tmp_path / "merged")
    merged, original = AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), tiny("llama")
    lk.load(original, tmp_path / "a")
    for path in layers(model):
        assert error(weight_at(merged.get_submodule(path), None), expected(original, path)) < 1e-7
    assert close(output(merged), output(original))
    with pytest.raises(BadAdapterFile, match="another base"):
        tiny("llama", seed=1).save_pretrained(tmp_path / "other")
        merge_checkpoint(tmp_path / "other", tmp_path / "a", tmp_path / "no")


@every_width
def test_an_adapter_merges_into_the_dequantised_weights_on_disk(width: Width, folder: Path, tmp_path: Path) -> None:
    model = adapted("llama", width)
    lk.save(model, "a", tmp_path / "a")
    plain, _ = load(str(folder), quantise=width)
    dequantise(plain)
    assert layers(plain) == {}
    lk.load(plain, tmp_path / "a")
    lk.merge(plain, "a")
    plain.save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for path in layers(model):
        assert error(weight_at(merged.get_submodule(path), None), expected(model, path)) < 1e-7
    assert close(output(merged), output(model))


@every_width
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_quantises(width: Width, dtype: torch.dtype, folder: Path) -> None:
    model, _ = load(str(folder), quantise=width, dtype=dtype)
    wanted = quantised("llama", width)
    assert not model.training
    assert same_bits(
        {path: layer.weight for path, layer in layers(model).items()},
        {path: layer.weight for path, layer in layers(wanted).items()},
    )
    assert model.lm_head.weight.dtype == model.dtype == model.config.dtype == dtype
    assert output(model).dtype == dtype
    classifier, _ = load(str(folder), quantise=width, labels=3)
    assert isinstance(classifier.score, nn.Linear)
    assert layers(classifier)


def test_what_cannot_be_quantised_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="no GGUF file"):
        load(str(folder), quantise="gguf")
    with pytest.raises(BadModel, match="quantise is one of none, int8, int4, gguf, not 'int3'"):
        load("a model that is not even looked for", quantise="int3")  # type: ignore[arg-type]
    model = tiny("llama")
    with pytest.raises(BadModel, match="int8 or int4, not as 'int3'"):
        quantise(model, "int3")  # type: ignore[arg-type]
    lk.attach(model, LORA, name="a")
    for verb in (lambda: quantise(model, "int8"), lambda: dequantise(model)):
        with pytest.raises(BadState, match="an adapter is attached"):
            verb()
    lk.detach(model, "a")
    quantise(model, "int8")
    with pytest.raises(BadModel, match="no linear layer in floats"):
        quantise(model, "int4")
    model.save_pretrained(tmp_path / "codes")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "codes")
    with pytest.raises(BadModel, match="codes"):
        load(str(tmp_path / "codes"))


@every_width
def test_a_model_without_values_can_be_quantised_to_see_its_size(width: Width) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny("llama").config)
    quantise(model, width)
    lk.attach(model, LORA)
    assert lk.summary(model).base_bytes == lk.summary(adapted("llama", width)).base_bytes
    layer = next(iter(layers(model).values()))
    assert layer(torch.randn(3, layer.in_features, device="meta")).shape == (3, layer.out_features)


def test_stacked_experts_keep_their_floats_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = quantised("mixtral", "int8")
    assert "hold stacked experts, which stay in floats" in caplog.text
    assert all("self_attn" in path for path in layers(model))


@every_width
def test_copies_and_casts_keep_codes_and_scales(width: Width) -> None:
    model = quantised("llama", width)
    wanted, codes = output(model), {path: bits(layer) for path, layer in layers(model).items()}
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(copied), wanted)
    model.to(torch.bfloat16)
    assert output(model).dtype == torch.bfloat16
    assert all(same_bits(bits(layer), codes[path]) for path, layer in layers(model).items())
    exact = output(model.double())
    assert exact.dtype == torch.float64
    assert error(wanted, exact) < 1e-2  # the rest was cast to bfloat16 and back
    assert all(same_bits(bits(layer), codes[path]) for path, layer in layers(model).items())
    with torch.autocast("cpu", torch.bfloat16):
        assert next(iter(layers(model.float()).values()))(torch.randn(3, 32)).dtype == torch.bfloat16


@every_width
def test_checkpointed_and_compiled_forwards_are_the_same(width: Width) -> None:
    model = adapted("llama", width)
    ids = tokens(model)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    assert all(close(value, plain[key]) for key, value in gradients().items())
    model.eval().gradient_checkpointing_disable()
    layer = next(iter(layers(model).values()))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, layer.in_features, requires_grad=True)
    (wanted,) = torch.autograd.grad(layer(x).square().sum(), x)
    (found,) = torch.autograd.grad(compiled(x).square().sum(), x)
    assert close(found, wanted)


def test_layers_of_other_libraries_are_not_mistaken_for_linear_ones() -> None:
    import bitsandbytes as bnb

    class Strange(torch.Tensor):
        """A weight that decides what a product with it is."""

        def __tensor_flatten__(self) -> tuple[list[str], None]:
            return [], None

        @classmethod
        def __tensor_unflatten__(cls, *args: Any) -> Strange:
            raise NotImplementedError

    model = tiny("llama")
    for block in model.model.layers:
        weight = block.self_attn.q_proj.weight.detach().as_subclass(Strange)
        block.self_attn.q_proj.weight = nn.Parameter(weight, requires_grad=False)
    assert layout_of(model.model.layers[0].self_attn.q_proj) is None
    with pytest.raises(LorakitError, match=r"'attn.q' names Linear with a weight of the type Strange"):
        lk.attach(model, lk.LoRA())
    for block in model.model.layers:
        block.self_attn.q_proj = bnb.nn.Linear4bit(32, 32)
    with pytest.raises(LorakitError, match=r"Linear4bit of bitsandbytes \(lorakit.models.adopt"):
        lk.attach(model, lk.LoRA())
    assert layout_of(bnb.nn.Linear8bitLt(4, 4)) is None


@pytest.fixture
def quiet_bitsandbytes() -> Iterator[None]:
    bitsandbytes()
    yield


@pytest.mark.usefixtures("quiet_bitsandbytes")
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
@pytest.mark.parametrize(
    "settings",
    [
        dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        pytest.param(dict(load_in_4bit=True, bnb_4bit_quant_type="fp4"), marks=pytest.mark.slow),
        dict(load_in_8bit=True),
    ],
    ids=["nf4", "fp4", "int8"],
)
def test_what_bitsandbytes_quantised_is_taken_over(settings: dict[str, bool], folder: Path, tmp_path: Path) -> None:
    config = BitsAndBytesConfig(**settings)  # type: ignore[no-untyped-call]
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    width = "int8" if "load_in_8bit" in settings else "int4"
    model.save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "theirs")
    theirs = tiny("llama")
    assert adopt(model) == {width}
    assert not adopt(model)
    assert layers(model).keys() == layers(quantised("llama", width)).keys()
    for path, layer in layers(model).items():
        limit = 0.2 if settings.get("bnb_4bit_quant_type") == "fp4" else ERRORS[width]
        assert error(weight_at(layer, None), weight_at(theirs.get_submodule(path), None)) < limit
    lk.attach(model, LORA, name="a")
    with only_the_adapter_learns(model):
        trainer(model, tmp_path / "run", save_strategy="no", max_steps=6).train()
    again, _ = load(str(tmp_path / "theirs"))
    for path, layer in layers(model).items():
        assert torch.equal(weight_at(layers(again)[path], None), weight_at(layer, None))
    other: Width = "int4" if width == "int8" else "int8"
    with pytest.raises(BadModel, match=f"quantised already, in {width}"):
        load(str(tmp_path / "theirs"), quantise=other)


def test_layers_of_bitsandbytes_that_cannot_be_taken_over_are_named() -> None:
    import bitsandbytes as bnb

    model = tiny("llama")
    layer = model.model.layers[0].self_attn.q_proj = bnb.nn.Linear4bit(32, 32, bias=False)
    with pytest.raises(BadModel, match=r"layers\.0\.self_attn\.q_proj is not quantised yet"):
        adopt(model)
    model.to("cpu")
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(BadModel, match="bitsandbytes rewrites its codes; load the model anew"):
        adopt(model)


def test_a_missing_package_is_named_and_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    before = bits(model)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(MissingPackage, match="pip install bitsandbytes"):
        quantise(model, "int4")
    assert same_bits(bits(model), before)


def test_targets_are_named_as_over_floats() -> None:
    with pytest.raises(NoSuchTarget, match="did you mean"):
        lk.attach(quantised("llama", "int8"), lk.LoRA(targets="atn.q"))

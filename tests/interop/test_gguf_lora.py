"""A GGUF adapter is the adapter in llama.cpp's names and order of rows; it reads back to the bit."""

from __future__ import annotations

import logging
import random
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import lorakit as lk
from lorakit import interop
from lorakit.core.exchange import Exchange, Update
from lorakit.core.values import cast, value_of
from lorakit.errors import BadAdapterFile, BadModel, LorakitError
from lorakit.interop import Told
from lorakit.interop.formats import gguf as gguf_format
from tests.laws.cases import scramble
from tests.models import tiny_gguf
from tests.tiny import tiny

FAMILIES = (*tiny_gguf.READABLE, "gpt_neox", "smollm3")
LLAMA = "model.layers.0.self_attn.q_proj"


def numbers(path: Path) -> dict[str, NDArray[np.float32]]:
    """A file's tensors as the gguf package reads them."""
    tensors = gguf.GGUFReader(path).tensors
    return {t.name: gguf.dequantize(t.data, t.tensor_type).reshape(t.shape.tolist()[::-1]) for t in tensors}


def adapter(family: str, folder: Path, **fields: Any) -> tuple[Exchange, Path]:
    """A scrambled adapter of a tiny model, and the model as a GGUF file."""
    model = tiny_gguf.model_of(family)
    base = tiny_gguf.of_model(model, folder / "base.gguf")
    lk.attach(model, lk.LoRA(**{"rank": 4, "alpha": 6.0, "targets": "linear", **fields}), name="a")
    scramble(model, "a")
    lk.save(model, "a", folder / "a")
    return interop.read(folder / "a"), base


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def made(family: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Exchange, Path]:
    """A folder, the adapter in it, and its base as a GGUF file."""
    folder = tmp_path_factory.mktemp(family)
    return folder, *adapter(family, folder)


def lone(path: str = LLAMA, shape: tuple[int, int] = (32, 32), rank: int = 2, **fields: Any) -> Update:
    """An update of a layer."""
    seeded = torch.Generator().manual_seed(len(path))
    a, b = (torch.randn(size, generator=seeded) for size in ((rank, shape[1]), (shape[0], rank)))
    return Update(path, value_of(a), value_of(b), **{"alpha": 4.0, **fields})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.of_model(tiny("llama"), tmp_path_factory.mktemp("llama") / "llama.gguf")


def written(updates: tuple[Update, ...], base: Path, out: Path) -> list[str]:
    """Write updates of a tiny Llama; the notes."""
    return gguf_format.write(Exchange("peft", updates, base=str(base)), out, Told())


def delta(path: Path, name: str) -> NDArray[np.float64]:
    """scale · B A of a file by llama.cpp's rule."""
    found, alpha = numbers(path), gguf.GGUFReader(path).fields["adapter.lora.alpha"].contents()
    a, b = (found[f"{name}.weight.lora_{part}"].astype(np.float64) for part in "ab")
    return float(alpha) / b.shape[1] * b @ a


def test_added_to_the_bases_tensors_it_gives_those_of_the_merged_model(
    family: str, made: tuple[Path, Exchange, Path], tmp_path: Path
) -> None:
    folder, exchange, base = made
    interop.convert(folder / "a", tmp_path / "a.gguf", "gguf", Told(base=str(base)))
    model = tiny_gguf.model_of(family)
    lk.load(model, folder / "a", name="a")
    lk.merge(model, "a")
    plain = tiny_gguf.model_of(family)
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if ".adapters." not in name})
    ours, theirs = numbers(base), numbers(tiny_gguf.of_model(plain, tmp_path / "merged.gguf"))
    changed = {name.removesuffix(".weight.lora_a") for name in numbers(tmp_path / "a.gguf") if name.endswith("_a")}
    assert len(changed) == len(exchange.updates) > 4
    for name in theirs:
        place = name.removesuffix(".weight")
        new = ours[name] + (delta(tmp_path / "a.gguf", place) if place in changed else 0.0)
        np.testing.assert_allclose(new, theirs[name], rtol=0, atol=1e-6)
        assert (place in changed) == (not np.array_equal(ours[name], theirs[name]))


def test_llama_cpp_would_accept_it(made: tuple[Path, Exchange, Path], tmp_path: Path) -> None:
    """What its loader demands of keys, names and shapes (ne: columns first)."""
    _, exchange, base = made
    gguf_format.write(exchange, tmp_path / "a.gguf", Told(base=str(base)))
    reader, model = gguf.GGUFReader(tmp_path / "a.gguf"), gguf.GGUFReader(base)
    told = {key: reader.fields[key].contents() for key in ("general.type", "adapter.type", "general.architecture")}
    assert told == {
        "general.type": "adapter",
        "adapter.type": "LORA".lower(),
        "general.architecture": model.fields["general.architecture"].contents(),
    }
    tensors = {tensor.name: tensor.shape for tensor in model.tensors}
    shapes = {tensor.name: tensor.shape for tensor in reader.tensors}
    for name in (name.removesuffix(".lora_a") for name in shapes if name.endswith(".lora_a")):
        a, b = shapes[f"{name}.lora_a"], shapes[f"{name}.lora_b"]
        assert (tensors[name][0], tensors[name][1], a[1]) == (a[0], b[1], b[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_round_trip_is_exact(made: tuple[Path, Exchange, Path], dtype: torch.dtype, tmp_path: Path) -> None:
    _, exchange, base = made
    updates = tuple(replace(each, a=cast(each.a, dtype), b=cast(each.b, dtype)) for each in exchange.updates)
    updates = tuple(replace(each, alpha=6.0) for each in updates)  # one for all: nothing is folded
    notes = gguf_format.write(replace(exchange, updates=updates), tmp_path / "a.gguf", Told(base=str(base)))
    again = interop.read(tmp_path / "a.gguf")  # the file tells the heads; the base is not asked for again
    assert notes == [] and again.base == str(base)
    for first, second in zip(updates, again.updates, strict=True):
        assert (first.path, first.alpha, first.form) == (second.path, second.alpha, second.form)
        assert first.a.dtype == second.a.dtype == dtype
        assert torch.equal(first.a.read(), second.a.read()) and torch.equal(first.b.read(), second.b.read())


def test_a_folder_tells_the_same_layout_as_a_gguf_file(tmp_path: Path) -> None:
    exchange, base = adapter("llama", tmp_path)
    tiny("llama").save_pretrained(tmp_path / "folder")
    for name, told in (("one", base), ("two", tmp_path / "folder")):
        gguf_format.write(exchange, tmp_path / name, Told(base=str(told)))
    one, two = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    assert list(one) == list(two) and all(np.array_equal(one[name], two[name]) for name in one)


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    exchange, base = adapter("llama", tmp_path)
    for name in ("one", "two"):
        gguf_format.write(exchange, tmp_path / name, Told(base=str(base)))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", "a", "base.gguf"}


def test_an_embeddings_a_is_turned_as_llama_cpp_wants_it(llama: Path, tmp_path: Path) -> None:
    embedding = lone("model.embed_tokens", (32, 64), form="embedding")
    path = tmp_path / "a.gguf"
    assert written((embedding, lone()), llama, path) == []
    assert numbers(path)["token_embd.weight.lora_a"].shape == (64, 2)
    first, _ = interop.read(path).updates
    assert first.form == "embedding" and torch.equal(first.a.read(), embedding.a.read())
    assert torch.equal(first.b.read(), embedding.b.read())


@pytest.mark.parametrize(
    ("fields", "others", "notes"),
    [
        ({}, {}, []),
        ({"alpha": 4.0, "rooted": True}, {"alpha": 4.0, "rooted": True}, ["in the file's float32: relative error"]),
        (
            {"alpha": 0.1},
            {"alpha": 0.1},
            ["alpha is 0.10000000149011612 in the file's float32: relative error 1.5e-08"],
        ),
        ({"alpha": 16.0}, {}, ["1 of 3 scales are folded", "at most 0.0e+00"]),
        ({"alpha": -4.0}, {}, ["1 of 3 scales are folded", "at most 0.0e+00"]),
        ({"alpha": 0.0}, {}, ["1 of 3 scales are folded", "at most 0.0e+00"]),
        ({"alpha": 0.0}, {"alpha": 0.0}, ["3 of 3 scales are folded", "at most 0.0e+00"]),
        ({"alpha": 5.0}, {}, ["1 of 3 scales are folded"]),
        ({"alpha": 5.0, "rooted": True}, {"alpha": 3.0, "rank": 3}, ["1 of 3 scales are folded"]),
        ({"diagonal": value_of(torch.tensor([[0.3], [-2.0]]))}, {}, ["1 of 3 scales are folded"]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_follow_llama_cpps_rule(
    fields: dict[str, Any], others: dict[str, Any], notes: list[str], dtype: torch.dtype, llama: Path, tmp_path: Path
) -> None:
    """alpha / R with one alpha for all; what it does not give is folded, within the rounding of float32."""
    paths = [f"model.layers.{layer}.self_attn.v_proj" for layer in (0, 1, 1)]
    paths[2] = "model.layers.1.mlp.down_proj"
    shapes = ((16, 32), (16, 32), (32, 48))
    given = (fields, others, others)
    updates = [lone(path, shape, **own) for path, shape, own in zip(paths, shapes, given, strict=True)]
    updates = [replace(each, a=cast(each.a, dtype), b=cast(each.b, dtype)) for each in updates]
    path = tmp_path / "a.gguf"
    said = written(tuple(updates), llama, path)
    assert len(said) == bool(notes) and all(words in said[0] for words in notes)
    for update, name in zip(updates, ("blk.0.attn_v", "blk.1.attn_v", "blk.1.ffn_down"), strict=True):
        diagonal = torch.ones(1) if update.diagonal is None else update.diagonal.read().flatten()
        wanted = update.scale * (update.b.read().double() * diagonal) @ update.a.read().double()
        np.testing.assert_allclose(delta(path, name), wanted.numpy(), rtol=0, atol=1.2e-7 * float(wanted.abs().max()))


def test_other_dtypes_are_written_as_float32_and_that_is_said(llama: Path, tmp_path: Path) -> None:
    update = lone()
    path = tmp_path / "a.gguf"
    notes = written((replace(update, a=cast(update.a, torch.float64)),), llama, path)
    assert notes == ["1 tensors of other dtypes are float32 in the file: relative error at most 6.0e-08"]
    assert torch.equal(interop.read(path).updates[0].a.read(), update.a.read())


CANNOT = [
    (Exchange("peft", ()), "it has no low-rank updates"),
    (
        Exchange("peft", (lone(magnitude=value_of(torch.ones(32))),)),
        "is DoRA's, .* merge it into the base's GGUF",
    ),
    (Exchange("peft", (lone(shift=value_of(torch.ones(32))),)), "has a bias of B"),
    (Exchange("peft", (lone(alpha=float("nan")),)), "has the alpha nan"),
    (Exchange("peft", (lone(alpha=1e40),)), r"has the alpha 1e\+40"),
    (Exchange("peft", (lone(), lone())), "blk.0.attn_q.weight is changed twice"),
    (
        Exchange("peft", (lone(),), {"lm_head.weight": value_of(torch.ones(64, 32))}),
        r"holds 1 tensors .*lm_head",
    ),
    (Exchange("peft", (lone(form="experts"),)), "adapts experts"),
    (Exchange("peft", (lone(form="convolution"),)), "adapts convolution"),
    (Exchange("peft", (lone("model.layers.2.self_attn.q_proj"),)), "no name in GGUF for llama of 2 blocks"),
    (Exchange("peft", (lone("model.vision.proj"),)), "model.vision.proj has no name in GGUF"),
    (Exchange("peft", (lone("lm_head", (64, 32), form="embedding"),)), "lm_head has no name in GGUF"),
    (
        Exchange("peft", (lone(shape=(32, 16)),)),
        r"weight of shape \(32, 16\), but blk.0.attn_q.weight has \(32, 32\)",
    ),
    (Exchange("peft", (lone("model.layers.0.mlp.gate", (4, 32)),)), "which the base does not have"),
    (Exchange("peft", (replace(lone(), b=value_of(torch.full((32, 2), float("nan")))),)), "not finite real"),
]


@pytest.mark.parametrize(("exchange", "words"), CANNOT)
def test_what_the_format_cannot_express_is_refused_and_nothing_is_left(
    exchange: Exchange, words: str, llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadAdapterFile, match=words):
        gguf_format.write(exchange, tmp_path / "out.gguf", Told(base=str(llama)))
    assert not list(tmp_path.iterdir())


def test_the_file_keeps_the_bases_name_and_no_path(llama: Path, tmp_path: Path) -> None:
    """With the heads in the file, another name of the base is no reason to look for it."""
    exchange = Exchange("peft", (lone(),), base="someone/model")
    gguf_format.write(exchange, tmp_path / "a.gguf", Told(base=str(llama)))
    assert str(tmp_path).encode() not in (tmp_path / "a.gguf").read_bytes()
    assert interop.read(tmp_path / "a.gguf").base == "someone/model"
    assert interop.read(tmp_path / "a.gguf", Told(base="else/where")).base == "else/where"


def foreign(path: Path, tensors: dict[str, NDArray[Any]], **keys: Any) -> Path:
    """An adapter's file as another tool may write it; its keys tell nothing of heads."""
    writer = gguf.GGUFWriter(path, keys.pop("architecture", "llama"))
    for key, value in {"general.type": "adapter", "adapter.type": "LORA".lower(), **keys}.items():
        add: dict[type, Any] = {float: writer.add_float32, int: writer.add_uint16, str: writer.add_string}
        add[type(value)](key, value)
    for name, value in tensors.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if value.dtype == np.uint8 else None
        writer.add_tensor(name, value, raw_dtype=kind)
    return tiny_gguf._finish(writer, path)


def pair(name: str, rank: int = 2, rows: int = 32, columns: int = 32) -> dict[str, NDArray[np.float32]]:
    chance = np.random.default_rng(0)
    sizes = {"a": (rank, columns), "b": (rows, rank)}
    return {f"{name}.weight.lora_{part}": chance.normal(size=size).astype("f4") for part, size in sizes.items()}


def test_without_alpha_the_scale_is_1(tmp_path: Path) -> None:
    for number, keys in enumerate(({}, {"adapter.lora.alpha": 0.0}, {"adapter.lora.alpha": 3.0})):
        exchange = interop.read(foreign(tmp_path / f"{number}.gguf", pair("blk.0.attn_v"), **keys))
        assert exchange.updates[0].scale == (1.5 if number == 2 else 1.0)


def test_a_file_that_does_not_tell_heads_needs_its_base_for_q_and_k_only(llama: Path, tmp_path: Path) -> None:
    path = foreign(tmp_path / "q.gguf", pair("blk.0.attn_q"))
    assert interop.read(foreign(tmp_path / "v.gguf", pair("blk.0.attn_v"))).updates[0].path.endswith("v_proj")
    with pytest.raises(
        BadModel, match=r"blk.0.attn_q.weight depends on the number of heads, which only the base tells"
    ):
        interop.read(path)
    (update,) = interop.read(path, Told(base=str(llama))).updates
    by_head = pair("blk.0.attn_q")["blk.0.attn_q.weight.lora_b"].reshape(4, 4, 2, 2)
    assert np.array_equal(update.b.read().numpy(), by_head.swapaxes(1, 2).reshape(32, 2))


def test_blocks_are_read_as_float32(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors: dict[str, NDArray[Any]] = dict(pair("blk.0.attn_v", rank=32))
    raw = gguf.quantize(tensors["blk.0.attn_v.weight.lora_b"], gguf.GGMLQuantizationType.Q8_0)
    with caplog.at_level(logging.WARNING):
        exchange = interop.read(foreign(tmp_path / "q8.gguf", tensors | {"blk.0.attn_v.weight.lora_b": raw}))
    b = exchange.updates[0].b
    assert "holds 1 tensors in blocks of few bits; they are read as float32" in caplog.text
    assert b.dtype == torch.float32 and b.shape == (32, 32)
    assert np.array_equal(b.read().numpy(), gguf.dequantize(raw, gguf.GGMLQuantizationType.Q8_0))


def test_norms_are_left_out_as_llama_cpp_leaves_them_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    norm = {"blk.0.attn_norm.weight": np.ones(32, dtype="f4")}
    exchange = interop.read(foreign(tmp_path / "a.gguf", pair("blk.0.attn_v") | norm))
    assert len(exchange.updates) == 1 and not exchange.whole and "holds 1 norms" in caplog.text


def test_the_bases_name_is_a_link_to_the_hub_if_there_is_one(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    for key, value in (("general.type", "adapter"), ("adapter.type", "LORA".lower())):
        writer.add_string(key, value)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, "SmolLM2")
    writer.add_base_model_repo_url(0, "https://huggingface.co/HuggingFaceTB/SmolLM2-135M")
    for name, value in pair("blk.0.attn_v").items():
        writer.add_tensor(name, value)
    assert interop.read(tiny_gguf._finish(writer, tmp_path / "a.gguf")).base == "HuggingFaceTB/SmolLM2-135M"


A, B = pair("blk.0.attn_v").values()


@pytest.mark.parametrize(
    ("tensors", "keys", "words"),
    [
        ({}, {}, "it has no tensors"),
        ({"blk.0.attn_v.weight.lora_a": A}, {}, "blk.0.attn_v.weight lacks its B"),
        ({"blk.0.attn_v.weight.lora_b": B}, {}, "blk.0.attn_v.weight lacks its A"),
        ({"blk.0.attn_v.weight": A}, {}, "neither A nor B of a matrix"),
        ({"blk.0.ffn_up_exps.weight.lora_a": A[None]}, {}, r"of shape \(1, 2, 32\) is neither A nor B of a matrix"),
        (pair("blk.0.attn_v") | {"blk.0.attn_v.weight.lora_b": A}, {}, "cannot be multiplied"),
        (pair("blk.0.attn_x"), {}, "blk.0.attn_x.weight is no layer that transformers has for llama"),
        (pair("blk.0.attn_v"), {"adapter.type": "vector"}, "adapter of the type vector"),
        (pair("blk.0.attn_v"), {"general.type": "model"}, "it is a GGUF file of the type model, not of an adapter"),
        (pair("blk.0.attn_v"), {"adapter.lora.alpha": "much"}, "its alpha is no number"),
        (pair("blk.0.attn_v"), {"adapter.alora.invocation_tokens": "1"}, "it acts only after certain tokens"),
    ],
)
def test_strange_files_are_refused(tensors: Any, keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(BadAdapterFile, match=words):
        gguf_format.read(foreign(tmp_path / "a.gguf", tensors, **keys), Told())


def test_adapters_and_models_are_told_apart(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    written((lone(),), llama, path)
    unknown = foreign(tmp_path / "b.gguf", pair("blk.0.attn_v"), architecture="mamba")
    assert [gguf_format.recognises(each) for each in (path, unknown, llama)] == [True, True, False]
    assert not any(gguf_format.recognises(each) for each in (tmp_path, tmp_path / "none"))
    with pytest.raises(BadAdapterFile, match="of the type model, not of an adapter"):
        gguf_format.read(llama, Told())
    with pytest.raises(BadModel, match="the architecture mamba is not known here"):
        interop.read(unknown)
    qwen = tiny_gguf.of_model(tiny("qwen2"), tmp_path / "qwen.gguf")
    with pytest.raises(BadAdapterFile, match=r"made for llama, but .* is qwen2"):
        interop.read(path, Told(base=str(qwen)))


def test_damaged_files_are_refused_in_a_sentence(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    written((lone(),), llama, path)
    whole, chance = path.read_bytes(), random.Random(0)
    header = len(whole) - 2 * 32 * 2 * 4  # the numbers may be any
    for version, words in ((4, "version 4 of GGUF; lorakit reads 2 and 3"), (3 << 24, "big-endian")):
        path.write_bytes(whole[:4] + version.to_bytes(4, "little") + whole[8:])
        with pytest.raises(BadAdapterFile, match=words):
            gguf_format.read(path, Told())
    for _ in range(200):
        broken = bytearray(whole)
        for _ in range(3):
            broken[chance.randrange(header)] = chance.randrange(256)
        if chance.random() < 0.3:
            del broken[chance.randrange(len(broken)) :]
        path.write_bytes(broken)
        with suppress(LorakitError):  # any other exception fails
            gguf_format.read(path, Told())

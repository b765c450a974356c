"""A merged GGUF file is the base's own, but for the tensors that the adapter changes; it is the attached model."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

import lorakit as lk
from lorakit import interop
from lorakit.core import registry
from lorakit.core.exchange import Exchange
from lorakit.core.values import value_of
from lorakit.errors import BadAdapterFile, BadModel, NotMergeable, OutputExists
from lorakit.interop import Told, merged_gguf
from lorakit.interop.formats import gguf as gguf_format
from lorakit.interop.merged_gguf import merge_gguf
from lorakit.models import load
from tests.interop.test_gguf_lora import adapter, delta, foreign, lone, numbers, pair
from tests.laws.cases import close, output, scramble
from tests.models import tiny_gguf
from tests.tiny import tiny

Q = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.of_model(tiny("llama"), tmp_path_factory.mktemp("llama") / "llama.gguf")


def peft(*updates: Any, **fields: Any) -> Exchange:
    return Exchange("peft", updates, **fields)


def read_by_transformers(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", tiny_gguf.READABLE)
def test_it_is_the_attached_model(family: str, tmp_path: Path) -> None:
    exchange, base = adapter(family, tmp_path)
    model = tiny_gguf.model_of(family)
    lk.load(model, tmp_path / "a", name="a")
    assert merge_gguf(base, exchange, tmp_path / "merged.gguf") == []
    assert close(output(read_by_transformers(tmp_path / "merged.gguf")), output(model))
    with lk.use(model, None):
        assert close(output(read_by_transformers(base)), output(model))


@pytest.mark.parametrize(("type", "step"), [("F32", 1e-7), ("F16", 2**-11), ("BF16", 2**-8)])
def test_it_is_the_base_and_the_gguf_adapter(type: str, step: float, tmp_path: Path) -> None:
    """W + scale · B A, from the base's own numbers and those of the written adapter, rounded once."""
    exchange, _ = adapter("llama", tmp_path)
    base = tiny_gguf.of_model(tiny_gguf.model_of("llama"), tmp_path / "typed.gguf", type)
    gguf_format.write(exchange, tmp_path / "a.gguf", Told(base=str(base)))
    notes = merge_gguf(base, interop.read(tmp_path / "a.gguf"), tmp_path / "merged.gguf")
    old, new = numbers(base), numbers(tmp_path / "merged.gguf")
    changed = {name.removesuffix(".weight.lora_a") for name in numbers(tmp_path / "a.gguf") if name.endswith("_a")}
    assert len(changed) == 14
    for name in changed:
        exact = old[f"{name}.weight"] + delta(tmp_path / "a.gguf", name)
        assert np.all(np.abs(new[f"{name}.weight"] - exact) <= step * np.abs(exact) + 1e-7)
    types = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(tmp_path / "merged.gguf").tensors}
    assert types == {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(base).tensors}
    assert [f"14 merged tensors are rounded to {type} once: relative error" in note for note in notes] == [True] * (
        type != "F32"
    )


def test_all_else_keeps_its_bytes(llama: Path, tmp_path: Path) -> None:
    merge_gguf(llama, peft(lone()), tmp_path / "m.gguf")
    before, after = llama.read_bytes(), (tmp_path / "m.gguf").read_bytes()
    changed = next(t for t in gguf.GGUFReader(llama).tensors if t.name == "blk.0.attn_q.weight")
    here = slice(changed.data_offset, changed.data_offset + changed.n_bytes)
    assert before[here] != after[here]
    assert before[: here.start] + before[here.stop :] == after[: here.start] + after[here.stop :]
    merge_gguf(llama, peft(lone()), tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == after


def test_a_few_rows_at_a_time_give_the_same(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, int]] = []
    merge_gguf(llama, peft(lone()), tmp_path / "one.gguf", lambda *told: seen.append(told))
    monkeypatch.setattr(merged_gguf, "AT_ONCE", 100)
    merge_gguf(llama, peft(lone()), tmp_path / "two.gguf")
    one, two = (numbers(tmp_path / f"{name}.gguf")["blk.0.attn_q.weight"] for name in ("one", "two"))
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-6)
    assert [number for _, number, _ in seen] == list(range(1, 22)) and seen[0][::2] == ("token_embd.weight", 21)


@pytest.mark.parametrize("type", ["Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_blocks_are_quantised_again(type: str, tmp_path: Path) -> None:
    base = tiny_gguf.of_model(tiny("llama", intermediate_size=64), tmp_path / "base.gguf", type)
    update = lone(alpha=0.2)
    (note,) = merge_gguf(base, peft(update), tmp_path / "m.gguf")
    gguf_format.write(peft(update), tmp_path / "a.gguf", Told(base=str(base)))
    exact = numbers(base)["blk.0.attn_q.weight"] + delta(tmp_path / "a.gguf", "blk.0.attn_q").astype("f4")
    (new,) = (t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if t.name == "blk.0.attn_q.weight")
    held = gguf.dequantize(new.data, new.tensor_type)
    assert new.tensor_type == Q[type]
    np.testing.assert_allclose(held, gguf.dequantize(gguf.quantize(exact, Q[type]), Q[type]), atol=1e-5)
    lost, change = np.linalg.norm(held - exact), np.linalg.norm(exact - numbers(base)["blk.0.attn_q.weight"])
    error = f"{lost / np.linalg.norm(exact):.1e}, which is {lost / change:.1e} of what the adapter changes"
    assert note == f"1 merged tensors are quantised to {type} again: relative error {error}"


def test_blocks_become_f16_on_request(tmp_path: Path) -> None:
    """What quantising again would lose of a small change is kept."""
    update = lone(alpha=0.01)
    base = tiny_gguf.of_model(tiny("llama", intermediate_size=64), tmp_path / "q4.gguf", "Q4_0")
    (again,) = merge_gguf(base, peft(update), tmp_path / "again.gguf")
    (floats,) = merge_gguf(base, peft(update), tmp_path / "floats.gguf", floats=True)
    assert "are quantised to Q4_0 again" in again and "were Q4_0 and are F16" in floats
    assert _lost(floats) < 0.05 < 0.5 < _lost(again)


def _lost(note: str) -> float:
    """The share of the adapter's change that a note tells."""
    return float(note.split("which is ")[1].split()[0])


def test_blocks_that_the_package_cannot_make_become_f16(tmp_path: Path) -> None:
    """Types of blocks of 256 numbers are read, but not written; tensors after them move, and keep their numbers."""
    model = tiny("llama", hidden_size=256, intermediate_size=256)
    base, chance = tmp_path / "base.gguf", np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:  # blocks of any bytes are numbers; half-precision scales come last
        patch.setattr(gguf, "quantize", lambda rows, kind: _blocks(chance, rows) if kind == Q.Q6_K else rows)
        tiny_gguf.of_model(model, base, "Q6_K")
    update = lone("model.layers.0.self_attn.v_proj", (128, 256), alpha=0.01)
    (note,) = merge_gguf(base, peft(update), tmp_path / "m.gguf")
    gguf_format.write(peft(update), tmp_path / "a.gguf", Told(base=str(base)))
    old, new = numbers(base), numbers(tmp_path / "m.gguf")
    exact = old["blk.0.attn_v.weight"] + delta(tmp_path / "a.gguf", "blk.0.attn_v")
    np.testing.assert_allclose(new["blk.0.attn_v.weight"], exact, rtol=2**-11, atol=1e-6)
    assert all(np.array_equal(old[name], new[name]) for name in old if name != "blk.0.attn_v.weight")
    assert "1 merged tensors were Q6_K and are F16: relative error" in note


def _blocks(chance: np.random.Generator, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    blocks = chance.integers(0, 256, (*rows.shape[:-1], rows.shape[-1] // 256, 210), dtype=np.uint8)
    blocks[..., -2:] = np.frombuffer(np.float16(0.001).tobytes(), dtype=np.uint8)
    return blocks.reshape(*rows.shape[:-1], -1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rooted", [False, True])
def test_dora_merges_as_peft_merges_it(rooted: bool, llama: Path, tmp_path: Path) -> None:
    model = get_peft_model(
        tiny("llama"), LoraConfig(r=4, target_modules=["q_proj", "up_proj"], use_dora=True, use_rslora=rooted)
    )
    scale = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter + 0.1 * torch.randn(parameter.shape, generator=scale)
    model.save_pretrained(tmp_path / "dora")
    merge_gguf(llama, interop.read(tmp_path / "dora"), tmp_path / "m.gguf")
    theirs = numbers(tiny_gguf.of_model(model.merge_and_unload(), tmp_path / "theirs.gguf"))
    ours = numbers(tmp_path / "m.gguf")
    assert all(np.allclose(ours[name], theirs[name], rtol=0, atol=2e-6) for name in theirs)


def test_an_untied_embedding_and_lambda_are_merged(llama: Path, tmp_path: Path) -> None:
    embedding = lone("model.embed_tokens", (32, 64), form="embedding")
    pruned = lone(diagonal=value_of(torch.tensor([[0.5], [-3.0]])))
    merge_gguf(llama, peft(embedding, pruned), tmp_path / "m.gguf")
    change = {name: new - numbers(llama)[name] for name, new in numbers(tmp_path / "m.gguf").items()}
    wanted = 2 * (embedding.b.read() @ embedding.a.read()).T
    np.testing.assert_allclose(change["token_embd.weight"], wanted, rtol=0, atol=1e-5)
    wanted = 2 * (pruned.b.read() * torch.tensor([0.5, -3.0])) @ pruned.a.read()
    paired = wanted.reshape(4, 2, 4, 32).transpose(1, 2).reshape(32, 32)
    np.testing.assert_allclose(change["blk.0.attn_q.weight"], paired, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("exchange", "error", "words"),
    [
        (peft(), BadAdapterFile, "it has no low-rank updates"),
        (
            peft(lone(shift=value_of(torch.ones(32)))),
            BadAdapterFile,
            "has a bias of B; merge it into the base's folder",
        ),
        (peft(lone(), whole={"lm_head.weight": value_of(torch.ones(64, 32))}), BadAdapterFile, r"1 tensors .*lm_head"),
        (peft(lone("lm_head", (64, 32)), lone(shape=(16, 32))), BadAdapterFile, r"blk.0.attn_q.weight has \(32, 32\)"),
        (peft(lone("model.layers.9.self_attn.q_proj")), BadAdapterFile, "no name in GGUF for llama of 2 blocks"),
        (peft(lone(form="experts")), BadAdapterFile, "adapts experts"),
        (peft(lone(), lone()), BadAdapterFile, r"blk.0.attn_q.weight is changed twice"),
        (
            peft(lone("model.embed_tokens", (32, 64), form="embedding", magnitude=value_of(torch.ones(64)))),
            BadAdapterFile,
            "is DoRA's of an embedding",
        ),
        (peft(replace(lone(), a=value_of(torch.full((2, 32), torch.inf)))), BadAdapterFile, "not finite real numbers"),
        (peft(lone(alpha=1e40)), NotMergeable, r"merging gives blk.0.attn_q.weight a value that is not finite"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_left(
    exchange: Exchange, error: type[Exception], words: str, llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        merge_gguf(llama, exchange, tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("type", ["F16", "Q8_0"])
def test_numbers_beyond_the_type_are_refused(type: str, tmp_path: Path) -> None:
    base = tiny_gguf.of_model(tiny("llama", intermediate_size=64), tmp_path / "base.gguf", type)
    with pytest.raises(NotMergeable, match="not finite"):
        merge_gguf(base, peft(lone(alpha=1e7)), tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == [base]


def test_the_base_is_a_whole_model_of_a_known_architecture(llama: Path, tmp_path: Path) -> None:
    tied = tiny_gguf.of_model(tiny("llama", tied=True), tmp_path / "tied.gguf")
    with pytest.raises(BadAdapterFile, match="embed_tokens shares its weight with another layer"):
        merge_gguf(tied, peft(lone("model.embed_tokens", (32, 64), form="embedding")), tmp_path / "out.gguf")
    (tmp_path / "cut.gguf").write_bytes(llama.read_bytes()[:-5000])
    (tmp_path / "mamba.gguf").write_bytes(
        llama.read_bytes().replace(b"\5\0\0\0\0\0\0\0llama", b"\5\0\0\0\0\0\0\0mamba")
    )
    (tmp_path / "empty.gguf").write_bytes(b"")
    adapter = foreign(tmp_path / "adapter.gguf", pair("blk.0.attn_v"))
    keys = {"general.type": "model", "split.count": 3, "llama.attention.head_count": 4}
    part = foreign(tmp_path / "part.gguf", pair("blk.0.attn_v"), **keys)
    for base, words in (
        (tmp_path / "none.gguf", "it cannot be read .No such file"),
        (tmp_path / "empty.gguf", "damaged, or no GGUF file"),
        (tmp_path, "it cannot be read .Is a directory"),
        (tmp_path / "cut.gguf", "it ends early: .* is not whole"),
        (tmp_path / "mamba.gguf", "the architecture mamba is not known here"),
        (part, "is one of 3 parts; join them with llama-gguf-split --merge"),
        (adapter, "of the type adapter, not of a model"),
    ):
        with pytest.raises(BadModel, match=words):
            merge_gguf(base, peft(lone()), tmp_path / "out.gguf")
    (tmp_path / "out.gguf").touch()
    with pytest.raises(OutputExists):
        merge_gguf(llama, peft(lone()), tmp_path / "out.gguf")


MEASURE = """
import resource, sys, torch, gguf
from pathlib import Path
from lorakit import interop
from lorakit.interop.merged_gguf import merge_gguf
folder = Path(sys.argv[1])
def merge(name):
    merge_gguf(folder / f"{name}.gguf", interop.read(folder / name), folder / f"{name}-merged.gguf")
merge("small")          # imports, code paths, allocator
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge("large")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_merging_needs_memory_for_some_rows_not_for_a_model(tmp_path: Path) -> None:
    sizes = dict(vocab_size=20000, hidden_size=1024, intermediate_size=1024, num_hidden_layers=8)
    for name, fields in (("small", {}), ("large", sizes)):
        model = tiny("llama", **fields)
        tiny_gguf.of_model(model, tmp_path / f"{name}.gguf")
        lk.attach(model, lk.LoRA(rank=4, targets="linear"), name="a")
        scramble(model, "a")
        lk.save(model, "a", tmp_path / name)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_TRIM_THRESHOLD_": "65536"}
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], env=environment, check=True, capture_output=True, text=True
    )
    size = (tmp_path / "large.gguf").stat().st_size
    assert size > 350e6 and int(run.stdout.split()[-1]) < size / 4
    old, new = ({t.name: t for t in gguf.GGUFReader(tmp_path / f"large{end}.gguf").tensors} for end in ("", "-merged"))
    assert np.array_equal(old["token_embd.weight"].data, new["token_embd.weight"].data)


@pytest.mark.slow
def test_smollm2_merged_is_smollm2_with_the_adapter(tmp_path: Path) -> None:
    """The real one: 30 layers, 9 heads on 3, 4-bit blocks. What is lost is what quantising again loses."""
    base = registry.find("lorakit.models.packaged", "smollm2-135m").model.path()
    model, _ = load("smollm2-135m")
    lk.attach(model, lk.LoRA(rank=8, targets="attn.q,attn.k,mlp.down"), name="a")
    scramble(model, "a")
    lk.save(model, "a", tmp_path / "a")
    interop.convert(tmp_path / "a", tmp_path / "a.gguf", "gguf", Told(base="smollm2-135m"))
    (note,) = merge_gguf(base, interop.read(tmp_path / "a.gguf"), tmp_path / "m.gguf")
    assert "90 merged tensors are quantised to Q4_1 again" in note
    old, new, own = numbers(base), numbers(tmp_path / "m.gguf"), dict(model.named_parameters())
    for name in ("blk.0.attn_q", "blk.17.attn_k", "blk.29.ffn_down"):
        exact = (old[f"{name}.weight"] + delta(tmp_path / "a.gguf", name)).astype("f4")
        held = gguf.dequantize(gguf.quantize(exact, Q.Q4_1), Q.Q4_1)
        assert np.mean(np.isclose(new[f"{name}.weight"], held, atol=1e-6)) > 0.999  # rounding decides on an edge
    lk.merge(model, "a")
    ours = (
        own["model.layers.17.self_attn.k_proj.weight"].detach().reshape(3, 2, 32, 576).transpose(1, 2).reshape(192, 576)
    )
    exact = old["blk.17.attn_k.weight"] + delta(tmp_path / "a.gguf", "blk.17.attn_k")
    np.testing.assert_allclose(exact, ours, rtol=0, atol=1e-5)

"""What a base tells of names and order of rows, and the table of what llama.cpp's converter does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorakit.core.exchange import Exchange
from lorakit.errors import BadAdapterFile, BadModel, LorakitError, OutputExists
from lorakit.interop import Told
from lorakit.interop._gguf_names import KINDS, Layout, _paths, layout_of
from lorakit.interop.formats import gguf as gguf_format
from tests.interop.test_gguf_lora import lone, written
from tests.models import tiny_gguf
from tests.tiny import tiny


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.of_model(tiny("llama"), tmp_path_factory.mktemp("llama") / "llama.gguf")


@pytest.mark.parametrize("architecture", KINDS)
def test_names_and_paths_are_each_others_inverse(architecture: str) -> None:
    layout = Layout(architecture, 3, heads=4, kv_heads=2)
    names = [name.replace(".0.", ".2.") for name in _paths(architecture)]
    assert [layout.tensor(str(layout.path(name))) for name in names] == names
    adapted = {"attn_output", "token_embd"} | (
        {"attn_qkv"} if "blk.2.attn_qkv.weight" in names else {"attn_q", "attn_v"}
    )
    assert adapted <= {name.split(".")[-2] for name in names}
    assert layout.path("blk.2.nothing.weight") is None and layout.tensor("model.layers.3.self_attn.q_proj") is None


@pytest.mark.parametrize("architecture", KINDS)
def test_an_order_holds_every_row_once(architecture: str) -> None:
    layout = Layout(architecture, 1, heads=4, kv_heads=2)
    orders = {name: layout.order(f"blk.0.{name}.weight", 48) for name in ("attn_q", "attn_k", "attn_v", "attn_qkv")}
    moved = {"kept": set(), "paired": {"attn_q", "attn_k"}, "grouped": {"attn_qkv"}}[KINDS[architecture].rows]
    assert {name for name, order in orders.items() if order is not None} == moved
    assert all(sorted(order.tolist()) == list(range(48)) for order in orders.values() if order is not None)


def test_rows_that_heads_do_not_divide_are_refused() -> None:
    with pytest.raises(BadModel, match="has 50 rows, which cannot be those of 4 heads"):
        Layout("llama", 1, heads=4, kv_heads=2).order("blk.0.attn_q.weight", 50)


def test_a_packaged_model_is_known_by_its_name() -> None:
    layout = layout_of("smollm2-135m")
    assert (layout.architecture, layout.blocks, layout.heads, layout.kv_heads, layout.tied) == ("llama", 30, 9, 3, True)
    assert layout.shapes is not None and layout.shapes["blk.29.attn_k.weight"] == (192, 576)


def test_the_base_decides(llama: Path, tmp_path: Path) -> None:
    """It must be named, be readable, of a known architecture, and hold what is adapted apart."""
    one = Exchange("peft", (lone("lm_head", (64, 32)),))
    tied = tiny_gguf.of_model(tiny("llama", tied=True), tmp_path / "tied.gguf")
    for family, fields in (("opt", {}), ("gptj", {}), ("llama", {"tied": True})):
        tiny(family, **fields).save_pretrained(tmp_path / family)
    (tmp_path / "text.gguf").write_text("hello, this is text")
    path = tmp_path / "a.gguf"
    written((lone(),), llama, path)
    bases: list[tuple[Any, type[LorakitError], str]] = [
        (None, BadAdapterFile, "does not name its base"),
        (tmp_path / "none", BadModel, "cannot be read; name its folder or GGUF file"),
        (tmp_path / "text.gguf", BadModel, "does not begin with GGUF"),
        (path, BadModel, "is a GGUF file of the type adapter, not of a model"),
        (tmp_path / "opt", BadModel, "the architecture opt is not known here; known are llama"),
        (tmp_path / "gptj", BadModel, "the architecture gptj is not known here"),
        (tmp_path / "llama", BadAdapterFile, "lm_head shares its weight"),
        (tied, BadAdapterFile, "lm_head shares its weight"),
    ]
    for base, error, words in bases:
        with pytest.raises(error, match=words):
            gguf_format.write(one, tmp_path / "out.gguf", Told(base=base and str(base)))
    with pytest.raises(OutputExists):
        gguf_format.write(replace(one, base=str(llama)), path, Told())

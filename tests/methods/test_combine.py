"""Methods that act together are as if each acted in its turn; one folder holds them all."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import lorakit as lk
from lorakit.core.files import TENSORS, safe_open
from lorakit.core.method import Method
from lorakit.core.state import adapter_tensors, attached_to, deltas_of
from lorakit.core.stepping import after_step, before_step, penalty
from lorakit.errors import BadAdapterFile, BadMethod, BadRouting, LorakitError, NotMergeable
from lorakit.interop import merge_checkpoint
from lorakit.methods.combine import Combine, combine
from tests.laws.cases import bits, close, output, same_bits, scramble
from tests.tiny import tiny

LINEAR = {"name": "lora", "rank": 2, "targets": "attention,mlp"}
WHOLE = {"name": "ia3", "targets": "attn.k,attn.v,attn.o", "inputs": "mlp.down"}
PAIRS: dict[str, tuple[Any, ...]] = {  # all of these can be merged
    "two ranks": ({"name": "lora", "targets": "attn.q"}, {"name": "lora", "targets": "attn.q,mlp.up", "rank": 2}),
    "scaled after": (LINEAR, WHOLE),
    "scaled before": (WHOLE, LINEAR),
    "biases": (LINEAR, "bitfit"),
    "biases, then scaled": ("bitfit", WHOLE),
    "scaled, then biases": (WHOLE, "bitfit"),
    "lengths": (LINEAR, {"name": "dora", "targets": "attn.v,mlp.up"}),
    "lengths, scaled, biases": ({"name": "dora", "targets": "attn.v,mlp.down"}, WHOLE, "bitfit"),
    "weights": ("full", LINEAR),
    "weights last": (LINEAR, WHOLE, {"name": "full", "top": 1}),
}
every_pair = pytest.mark.parametrize("parts", PAIRS.values(), ids=PAIRS)


def _adapted(parts: tuple[Any, ...], family: str = "bert", dtype: torch.dtype = torch.float32, **size: object):
    model = tiny(family, dtype, **size)
    lk.attach(model, combine(*parts), name="a")
    return model


@every_pair
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_merged_equals_attached_and_is_the_same_on_disk(family: str, parts: tuple[Any, ...], tmp_path: Path) -> None:
    model = _adapted(parts, family)
    before = bits(model)
    scramble(model, "a")
    attached = output(model)
    lk.save(model, "a", tmp_path / "a")
    lk.merge(model, "a")
    assert close(output(model), attached)
    tiny(family).save_pretrained(tmp_path / "base")
    merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    assert close(output(type(model).from_pretrained(tmp_path / "out").eval()), attached)
    lk.unmerge(model)
    assert same_bits({k: v for k, v in bits(model).items() if ".adapters." not in k},
                     {k: v for k, v in before.items() if ".adapters." not in k})  # fmt: skip


@torch.no_grad()
def _scramble_part(model: nn.Module, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for delta in deltas_of(model, "a"):
        for value in delta.parameters() if delta.placement.part == number else ():
            value += 0.05 * torch.randn(value.shape, generator=generator)


@every_pair
def test_every_part_acts(parts: tuple[Any, ...]) -> None:
    model = _adapted(parts)
    outputs = [output(model)]
    for number in range(1, len(parts) + 1):
        _scramble_part(model, number)
        outputs.append(output(model))
    assert all(not close(one, other) for one, other in pairwise(outputs))


def test_parts_act_in_their_order() -> None:
    """h = l (W + B A) x, by hand, and for the other order h = (l W + B A) x."""
    path = "encoder.layer.0.output.dense"
    vector = {"name": "ia3", "targets": path, "inputs": ()}
    x, found = torch.randn(3, 48, generator=torch.Generator().manual_seed(0)), []
    for parts in (({**LINEAR, "targets": path}, vector), (vector, {**LINEAR, "targets": path})):
        model = _adapted(parts)
        scramble(model, "a", std=0.3)
        tensors = {key.rpartition(".")[2]: value for key, value in adapter_tensors(model, "a").items()}
        layer, scale = model.get_submodule(path), 16 / 2
        base, low = x @ layer.weight.T + layer.bias, scale * x @ tensors["A"].T @ tensors["B"].T
        gain = tensors["vector"]
        found.append((layer(x), gain * (base + low) if parts[1] is vector else gain * base + low))
    assert all(close(ours, by_hand) for ours, by_hand in found)
    assert not close(found[0][0], found[1][0], 0.01)


@every_pair
def test_one_folder_holds_all_parts(parts: tuple[Any, ...], tmp_path: Path) -> None:
    model = _adapted(parts, "gpt2")
    scramble(model, "a")
    lk.save(model, "a", tmp_path / "one")
    other = tiny("gpt2")
    lk.load(other, tmp_path / "one", "a")
    with torch.no_grad():
        assert torch.equal(output(other), output(model))
    assert attached_to(other, "a").method == attached_to(model, "a").method
    lk.save(other, "a", tmp_path / "two")
    for name in (TENSORS, "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_parts_are_methods_names_or_tables() -> None:
    lora = lk.LoRA(rank=4)
    ways = (
        combine(lora, "bitfit"),
        combine({"name": "lora", "rank": 4}, {"name": "bitfit"}),
        Method.from_json({"name": "combine", "parts": [lora.to_json(), {"name": "bitfit"}]}),
        combine(combine(lora, "bitfit")),  # a combination's parts are parts
    )
    assert all(way == ways[0] for way in ways)
    assert Method.from_json(json.loads(json.dumps(ways[0].to_json()))) == ways[0]
    assert Combine(parts="lora, bitfit") == combine(lk.LoRA(), lk.BitFit())
    assert Combine() == combine("lora", "prefix-embedding")  # the pair of the paper
    assert Method.from_json({"name": "lora-prefix-layer"}) == combine("lora", "prefix-embedding", "prefix-layer")


def test_a_part_in_python_may_hold_tuples() -> None:
    listed, grouped = ({"name": "lora", "targets": kind(("attn.q", "attn.v"))} for kind in (list, tuple))
    assert combine(listed, "ia3") == combine(grouped, "ia3")


@pytest.mark.parametrize("parts", [5, None, {"name": "lora"}])
def test_parts_are_a_list_or_a_text(parts: Any) -> None:
    with pytest.raises(BadMethod, match=r"parts=.* must be (two methods or more|a list, or a text)"):
        Combine(parts=parts)


def test_heads_of_all_parts_are_trained_once() -> None:
    model = tiny("bert", labels=3)
    method = combine(lk.LoRA(train="classifier"), "bitfit", train="pooler")
    lk.attach(model, method, name="a")
    plan = attached_to(model, "a").plan
    assert [p.path for p in plan if p.kind == "module"] == ["bert.pooler.dense", "classifier"]
    assert len({(p.path, p.slot) for p in plan}) == len(plan)
    lk.attach(model, combine(lk.LoRA(), "full", train="classifier"), name="b")  # which leaves the head to itself
    assert [p.kind for p in attached_to(model, "b").plan if p.path == "classifier"] == ["module"]


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ((), "two methods or more"),
        (("lora",), "two methods or more"),
        (("lora", "lroa"), "did you mean lora"),
        (("lora", 3), "not 3"),
        (("lora", {"name": "lora", "rank": 0}), "rank=0"),
        (("lora", {"rank": 2}), "nothing called ''"),
        (({"name": "lora", "ranks": 5}, "ia3"), "its part lora has a bad ranks: 5"),
        (({"name": "lora", "dropout": "x"}, "ia3"), "its part lora has a bad dropout: 'x'"),
        (({"name": "lora", "targets": 5}, "ia3"), "its part lora has a bad targets: 5"),
        (({"name": "houlsby", "size": None, "colour": 3}, "ia3"), "its part houlsby has a bad size: None"),
        (("lora", {"name": "ia3", "rank": 3}), "ia3 has no field 'rank'"),
        (({"name": "prefix-embedding", "prefix": 4}, {"name": "prefix-layer", "prefix": 8}), "different numbers"),
        (("full", "lora", "full-top2"), "full and full both stand in for"),
    ],
)
def test_parts_that_make_no_sense_are_refused(parts: tuple[Any, ...], words: str) -> None:
    with pytest.raises(LorakitError, match=words):
        combine(*parts)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (("bitfit", lk.LoRA(bias="all")), "bitfit and lora both train the bias of"),
        (("dora", {"name": "dora", "targets": "attn.v"}), "dora and dora both read the base's weight of"),
        (("lora", lk.LoRA(targets="attn.quarry")), "attn.quarry"),
        (("bitfit", lk.LoRA(rank=33)), "largest rank"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts: tuple[Any, ...], words: str) -> None:
    model = tiny("bert")
    with pytest.raises(LorakitError, match=words):
        lk.attach(model, combine(*parts))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("rank", "parameters"), [(8, 37_896_192), (32, 151_142_400), (64, 302_137_344)], ids=["r=8", "r=32", "r=64"]
)
def test_the_papers_pair_trains_as_many_numbers_on_gpt3(rank: int, parameters: int) -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=96, n_embd=12288, n_head=96, n_positions=2048))
        lk.attach(model, combine(lk.LoRA(rank=rank), lk.PrefixEmbedding(prefix=8, infix=4)))
    assert lk.summary(model).trainable_parameters == parameters


def test_trained_weights_come_before_what_stands_in_for_them() -> None:
    """LoRA on stacked experts stands in for whatever is there; both act, and the base keeps its bits."""
    model, experts = tiny("mixtral"), {"name": "lora", "rank": 2, "targets": "mlp.up"}
    before = bits(model)
    lk.attach(model, combine(experts, "full"), name="a")
    for part in (1, 2):
        fresh = output(model)
        _scramble_part(model, part)
        assert not close(output(model), fresh)
    attached = output(model)
    assert same_bits({key: value for key, value in bits(model).items() if key in before}, before)
    lk.merge(model, "a")
    assert close(output(model), attached)
    lk.unmerge(model)
    lk.detach(model, "a")
    assert same_bits(bits(model), before)


@pytest.mark.parametrize("parts", [("bitfit", "compacter"), ("compacter", "compacter"), ("full", "compacter")])
@pytest.mark.parametrize("turned", [False, True])
def test_a_module_that_a_part_trains_whole_is_left_to_it(parts: tuple[str, ...], turned: bool, tmp_path: Path) -> None:
    model = _adapted(parts[::-1] if turned else parts, "gpt2")
    plan = attached_to(model, "a").plan
    whole = [placement.path for placement in plan if placement.kind == "module"]
    assert whole and len(set(whole)) == len(whole)
    assert all(placement.kind == "module" for placement in plan if placement.path in whole)
    scramble(model, "a")
    lk.save(model, "a", tmp_path / "a")
    other = tiny("gpt2")
    lk.load(other, tmp_path / "a")
    assert torch.equal(output(other), output(model))


@pytest.mark.parametrize("parts", [("pfeiffer", "compacter"), ("compacter", "pfeiffer")])
def test_a_module_is_not_adapted_by_one_part_and_trained_whole_by_another(parts: tuple[str, ...]) -> None:
    with pytest.raises(BadMethod, match="adapted and trained whole at once"):
        _adapted(parts, "bert")


def test_what_a_part_cannot_do_the_whole_cannot() -> None:
    model = _adapted(("lora", "prefix-embedding"), "gpt2")
    lk.attach(model, lk.LoRA(), name="b")
    lk.use(model, "a")
    with pytest.raises(NotMergeable, match="makes the sequence longer"):
        lk.merge(model, "a")
    with pytest.raises(BadRouting, match="makes the sequence longer"):
        lk.use(model, ["a", "b"])
    with pytest.raises(BadRouting, match="mixture"):
        lk.use(model, {"a": 0.5, "b": 0.5})
    assert attached_to(model, "a").method.inserts == lk.PrefixEmbedding().inserts


def test_a_fresh_lora_leaves_the_prefix_as_it_is() -> None:
    """The pair with LoRA at its start is the prefix alone."""
    model, alone = _adapted(("lora", "prefix-embedding"), "gpt2"), tiny("gpt2")
    lk.attach(alone, lk.PrefixEmbedding(), name="p")
    scramble(alone, "p")
    (words,) = [delta for delta in deltas_of(model, "a") if delta.placement.part == 2]
    with torch.no_grad():
        words.vectors.copy_(deltas_of(alone, "p")[0].vectors)
    assert torch.equal(output(model), output(alone))


def test_a_penalty_and_its_steps_reach_the_part_that_has_them() -> None:
    model = _adapted(("bitfit", {"name": "adalora", "targets": "attn.q"}))
    alone = tiny("bert")
    lk.attach(alone, lk.AdaLoRA(targets="attn.q"), name="a")
    losses = []
    for each in (model, alone):
        with torch.no_grad():
            for delta in deltas_of(each, "a"):
                for number, value in enumerate(delta.parameters() if not delta.placement.is_replaced else ()):
                    value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(number)))
        before_step(each, "a", 1, 10)
        added = penalty(each, "a")
        assert added is not None
        (output(each).pow(2).mean() + added).backward()
        after_step(each, "a", 1, 10)
        losses.append(added.detach())
    assert close(*losses)


def _rewritten(folder: Path, change) -> None:
    with safe_open(folder / TENSORS, framework="pt") as file:
        header = json.loads(file.metadata()["lorakit"])
    change(header)
    save_file(load_file(folder / TENSORS), folder / TENSORS, metadata={"lorakit": json.dumps(header)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: h["method"].update(parts=3), "parts are not a list"),
        (lambda h: h["method"].update(parts=[3, 4]), "parts are not a list"),
        (lambda h: h["method"].pop("parts"), "parts are not a list"),
        (lambda h: h["method"].update(parts=[dict(h["method"]), "lora"][:1]), "a combine among its parts"),
        (lambda h: h["method"].update(parts=h["method"]["parts"][:1]), "two methods or more"),
        (lambda h: h["method"]["parts"][0].update(name="nothing"), "nothing called 'nothing'"),
        (lambda h: h["method"]["parts"][0].update(rank="8"), "bad rank: '8'"),
        (lambda h: h["method"]["parts"][0].update(rank=0), "rank=0"),
        (lambda h: h["method"].update(colour=3), "unknown entry 'colour'"),
        (lambda h: h["plan"][0].update(part=9), "bad kind: 'low-rank'"),
        (lambda h: h["plan"][0].pop("part"), "bad kind: 'low-rank'"),
        (lambda h: h["plan"][0].update(part=-1), "the part -1"),
        (lambda h: h["plan"][-1].update(part=1), "bad kind: 'scaled-"),
        (lambda h: h["plan"].pop(), "is not part of it"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(change, words: str, tmp_path: Path) -> None:
    model = _adapted((LINEAR, WHOLE))
    lk.save(model, "a", tmp_path)
    _rewritten(tmp_path, change)
    other = tiny("bert")
    with pytest.raises(BadAdapterFile) as caught:
        lk.load(other, tmp_path)
    assert words in str(caught.value)
    assert not any(module._forward_hooks for module in other.modules())


def test_missing_and_unknown_tensors_name_their_part(tmp_path: Path) -> None:
    lk.save(_adapted((LINEAR, "bitfit")), "a", tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    with safe_open(tmp_path / TENSORS, framework="pt") as file:
        metadata = file.metadata()
    gone = next(key for key in sorted(tensors) if "part_1." in key)
    tensors["base_model.model.part_1.extra"] = tensors.pop(gone)
    save_file(tensors, tmp_path / TENSORS, metadata=metadata)
    with pytest.raises(BadAdapterFile) as caught:
        lk.load(tiny("bert"), tmp_path)
    assert f"{gone.removeprefix('base_model.model.')} is missing" in str(caught.value)
    assert "part_1.extra is not part of it" in str(caught.value)


def test_two_combinations_serve_rows_of_one_batch() -> None:
    model = tiny("gpt2")
    for number, name in enumerate("ab"):
        lk.attach(model, combine(LINEAR, WHOLE, "bitfit"), name=name)
        scramble(model, name, seed=number)
    rows = ["a", None, "b"]
    with lk.use(model, rows):
        mixed = output(model)
    for number, name in enumerate(rows):
        with lk.use(model, name):
            assert close(mixed[number], output(model)[number])

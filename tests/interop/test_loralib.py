"""loralib's own layers are the oracle: what is read has their change of W, what is written runs in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.exchange import Exchange, Part, Update, factored
from lorakit.core.sites import Slice
from lorakit.core.values import Value, value_of
from lorakit.errors import BadAdapterFile, LorakitError
from lorakit.interop.format import Told
from lorakit.interop.formats import loralib as checkpoint
from lorakit.interop.reading import format_of

ALPHA = 6.0
QKV = (True, False, True)


class Theirs(nn.Module):
    """One of each of loralib's layers that a model without convolutions has, and a head."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.wte = loralib.Embedding(11, 8, r=2, lora_alpha=ALPHA)
        self.c_attn = loralib.MergedLinear(8, 24, r=3, lora_alpha=ALPHA, enable_lora=list(QKV), fan_in_fan_out=True)
        self.fc = loralib.Linear(24, 6, r=4, lora_alpha=ALPHA)
        self.head = nn.Linear(6, 5)
        torch.manual_seed(0)
        for name, each in self.named_parameters():
            if "lora_" in name:
                nn.init.normal_(each)
        self.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.fc(self.c_attn(self.wte(ids))))
        return found


def delta(update: Update) -> Tensor:
    """ΔW by float64 algebra."""
    return update.scale * (update.b.read().double().flatten(1) @ update.a.read().double().flatten(1))


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def by_path(exchange: Exchange) -> dict[str, Update]:
    return {update.path: update for update in exchange.updates}


@pytest.fixture
def theirs() -> Theirs:
    return Theirs()


@pytest.fixture
def file(theirs: Theirs, tmp_path: Path) -> Path:
    return saved(tmp_path / "theirs.pt", loralib.lora_state_dict(theirs))


def test_every_layer_has_the_change_that_loralib_merges(theirs: Theirs, file: Path) -> None:
    found = by_path(checkpoint.read(file, Told(alpha=ALPHA, enabled=QKV)))
    wanted = {
        "wte": theirs.wte.lora_B @ theirs.wte.lora_A * theirs.wte.scaling,
        "c_attn": theirs.c_attn.merge_AB().T * theirs.c_attn.scaling,
        "fc": theirs.fc.lora_B @ theirs.fc.lora_A * theirs.fc.scaling,
    }
    assert {path: each.form for path, each in found.items()} == dict(wte="embedding", c_attn="linear", fc="linear")
    for path, each in wanted.items():
        torch.testing.assert_close(delta(found[path]), each.double(), rtol=1e-6, atol=1e-6)


def test_a_fused_layers_parts_are_its_roles(theirs: Theirs, file: Path) -> None:
    exchange = checkpoint.read(file, Told(alpha=ALPHA, enabled=QKV))
    assert exchange.updates[1].slices == (Part("part 0", Slice(0, 8, 24), 0, 3), Part("part 2", Slice(16, 8, 24), 3, 3))
    whole = delta(exchange.updates[1])
    for part in factored(exchange):
        if part.path == "c_attn":
            a, b = part.read()
            rows = whole[:8] if part.role == "part 0" else whole[16:]
            torch.testing.assert_close((b @ a).double(), rows, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_the_way_there_and_back_keeps_every_bit(tmp_path: Path, bias: str, dtype: torch.dtype) -> None:
    tensors = loralib.lora_state_dict(Theirs(dtype), bias)
    told = Told(alpha=ALPHA, enabled=QKV)
    notes = checkpoint.write(checkpoint.read(saved(tmp_path / "a.pt", tensors), told), tmp_path / "b.pt", told)
    again = torch.load(tmp_path / "b.pt", weights_only=True)
    assert sorted(again) == sorted(tensors)
    for name, each in tensors.items():
        assert again[name].dtype == dtype and torch.equal(again[name], each), name
    assert "lora_alpha=6" in notes[0] and "[True, False, True]" in notes[1]


def test_a_file_is_the_same_bytes_whatever_its_name(file: Path, tmp_path: Path) -> None:
    exchange = checkpoint.read(file, Told(alpha=ALPHA, enabled=QKV))
    for name in ("one.pt", "two.pt"):
        checkpoint.write(exchange, tmp_path / name, Told())
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "two.pt").read_bytes()


def test_loralibs_model_runs_what_was_written(tmp_path: Path) -> None:
    theirs = Theirs()
    base = {name: each.clone() for name, each in theirs.state_dict().items() if "lora_" not in name}
    exchange = Exchange("peft", tuple(_plain(theirs)), whole={"head.weight": value_of(torch.randn(5, 6))})
    checkpoint.write(exchange, tmp_path / "a.pt", Told())
    answer = theirs.load_state_dict(torch.load(tmp_path / "a.pt", weights_only=True), strict=False)
    assert not answer.unexpected_keys
    ids = torch.arange(11)
    found = theirs(ids)
    w = {update.path: delta(update) for update in exchange.updates}
    x = base["wte.weight"].double()[ids] + w["wte"].T[ids]
    x = x @ base["c_attn.weight"].double() + x @ w["c_attn"].T + base["c_attn.bias"]
    x = x @ (base["fc.weight"].double() + w["fc"]).T + base["fc.bias"]
    wanted = x @ exchange.whole["head.weight"].read().double().T + base["head.bias"]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def _plain(theirs: Theirs) -> Iterator[Update]:
    """New updates for each of their layers, of which all have alpha = 6 in loralib's terms."""

    def new(*shape: int) -> Value:
        return value_of(torch.randn(shape))

    yield Update("wte", new(2, 11), new(8, 2), ALPHA, form="embedding")
    blocks = torch.block_diag(torch.randn(8, 3), torch.zeros(8, 0), torch.randn(8, 3))
    parts = (Part("attn.q", Slice(0, 8, 24), 0, 3), Part("attn.v", Slice(16, 8, 24), 3, 3))
    yield Update("c_attn", new(6, 8), value_of(blocks), ALPHA * 2, slices=parts)
    yield Update("fc", new(4, 24), new(6, 4), ALPHA / 2, rooted=True)


BY_HEAD = (Part("attn.q", Slice(0, 2, 6, 2), 0, 1), Part("attn.k", Slice(2, 2, 6, 2), 1, 1))
IN_ROW = (Part("attn.q", Slice(0, 4, 12), 0, 1), Part("attn.k", Slice(4, 4, 12), 1, 1))


@pytest.mark.parametrize("parts", [BY_HEAD, IN_ROW])
def test_parts_that_no_merged_linear_has_become_one_plain_layer(tmp_path: Path, parts: tuple[Part, ...]) -> None:
    b = torch.zeros(12, 2)
    b[[0, 1, 6, 7], 0] = b[[2, 3, 8, 9], 1] = torch.randn(4)  # by head
    update = Update("qkv", value_of(torch.randn(2, 5)), value_of(b), 4.0, slices=parts)
    notes = checkpoint.write(Exchange("peft", (update,)), tmp_path / "a.pt", Told())
    again = checkpoint.read(tmp_path / "a.pt", Told(alpha=4.0)).updates[0]
    assert torch.equal(delta(again), delta(update)) and len(notes) == 1


@pytest.mark.parametrize("wrapped", [True, False])
def test_training_scripts_wrappings_are_taken_off(theirs: Theirs, tmp_path: Path, wrapped: bool) -> None:
    tensors = loralib.lora_state_dict(theirs)
    named = {f"module.{name}" if wrapped else name: each for name, each in tensors.items()}
    path = saved(tmp_path / "model.1000.pt", {"model_state_dict": named})
    found = checkpoint.read(path, Told(alpha=ALPHA, enabled=QKV))
    assert set(by_path(found)) == {"wte", "c_attn", "fc"}
    assert format_of(path) is checkpoint


def test_alpha_must_be_told(file: Path) -> None:
    with pytest.raises(BadAdapterFile, match=r"do not hold alpha; tell it \(--alpha\)"):
        checkpoint.read(file, Told(enabled=QKV))


@pytest.mark.parametrize("enabled", [None, (True, True, True), (True, False)])
def test_which_parts_are_adapted_must_be_told(file: Path, enabled: tuple[bool, ...] | None) -> None:
    with pytest.raises(BadAdapterFile, match=r"c_attn is several layers in one, 2 of them adapted; .*--enabled"):
        checkpoint.read(file, Told(alpha=ALPHA, enabled=enabled))


def test_one_part_alone_is_told_from_a_layer_by_the_base_only(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", loralib.lora_state_dict(_layer("q", loralib.Linear(4, 4, r=2))))
    with pytest.raises(BadAdapterFile, match="q is several layers in one, 1 of them"):
        checkpoint.read(path, Told(alpha=1.0, enabled=(False, True)))
    assert checkpoint.read(path, Told(alpha=1.0, enabled=QKV)).updates[0].b.shape == (4, 2)


def test_a_merged_weight_beside_the_update_is_refused(theirs: Theirs, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", theirs.state_dict())
    with pytest.raises(BadAdapterFile, match=r"wte has its whole weight beside the update, .*eval\(\) merges"):
        checkpoint.read(path, Told(alpha=ALPHA, enabled=QKV))


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"q.lora_A": torch.ones(2, 3)}, "q lacks its lora_B"),
        (
            {"q.lora_A": torch.ones(3, 3), "q.lora_B": torch.ones(3, 2)},
            r"q has A \(3, 3\) and B \(3, 2\), which do not",
        ),
        ({"q.lora_A": torch.ones(2, 3), "q.lora_B": torch.ones(3, 0)}, "q has A"),
        ({"q.lora_A": torch.ones(4, 3), "q.lora_B": torch.ones(7, 2)}, "q has A"),
        ({"q.lora_A": torch.ones(2, 3, 1), "q.lora_B": torch.ones(3, 2)}, "q has A"),
        ({"q.lora_A": torch.ones(2, 3), "q.lora_B": torch.ones(3, 2), "q.lora_E": torch.ones(2, 1)}, "q.lora_E is no"),
        ({"conv1.lora_A": torch.ones(2, 3), "conv1.lora_B": torch.ones(3, 2)}, r"conv1 is a convolution .*--base"),
        ({"wte.lora_A": torch.ones(4, 3), "wte.lora_B": torch.ones(3, 2)}, "wte has A"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(tmp_path: Path, tensors: dict[str, Tensor], reason: str) -> None:
    with pytest.raises(BadAdapterFile, match=reason):
        checkpoint.read(saved(tmp_path / "a.pt", tensors), Told(alpha=1.0))


def test_a_pickle_of_code_with_its_names_is_loralibs_to_refuse(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"q.lora_A": torch.ones(2, 2), "model": nn.Linear(2, 2)})
    assert format_of(path) is checkpoint
    with pytest.raises(BadAdapterFile, match=r"torch\.nn\.modules\.linear\.Linear"):
        checkpoint.read(path, Told(alpha=1.0))
    assert not checkpoint.recognises(saved(tmp_path / "training_args.bin", nn.Linear(2, 2)))
    assert not checkpoint.recognises(saved(tmp_path / "optimizer.pt", {"state": torch.ones(2)}))


def _update(**changes: Any) -> Update:
    plain = Update("q", value_of(torch.randn(2, 3)), value_of(torch.randn(4, 2)), 2.0)
    return replace(plain, **changes)


@pytest.mark.parametrize(
    ("exchange", "reason"),
    [
        (Exchange("peft", (_update(magnitude=value_of(torch.ones(4))),)), "q has a magnitude"),
        (Exchange("peft", (_update(shift=value_of(torch.ones(4))),)), "q has a bias of B"),
        (Exchange("peft", (_update(diagonal=value_of(torch.ones(2, 1))),)), "q has a diagonal"),
        (Exchange("peft", (_update(form="experts"),)), "q adapts experts"),
        (Exchange("peft", (_update(), _update(path="k", alpha=3.0))), "q has alpha 2, k 3; .*--to portable"),
        (Exchange("peft", (_update(b=value_of(torch.full((4, 2), torch.nan))),)), "q.lora_B holds values that are not"),
        (Exchange("peft", (_update(),), whole={"q.weight": value_of(torch.ones(4, 3))}), "q has its whole weight"),
        (Exchange("peft", ()), "no low-rank updates"),
    ],
)
def test_what_loralib_cannot_express_is_refused(tmp_path: Path, exchange: Exchange, reason: str) -> None:
    with pytest.raises(BadAdapterFile, match=reason):
        checkpoint.write(exchange, tmp_path / "a.pt", Told())
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_no_such_file_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LorakitError, match=r"ends in \.pt"):
        checkpoint.write(Exchange("peft", (_update(),)), tmp_path / "a", Told())


# With the base ------------------------------------------------------------------------------------------------------


def _layer(path: str, layer: nn.Module) -> nn.Module:
    """A model whose one layer lies at `path`, with random values."""
    model = nn.Module()
    inner = model
    *parents, name = path.split(".")
    for parent in parents:
        inner.add_module(parent, nn.Module())
        inner = inner.get_submodule(parent)
    inner.add_module(name, layer)
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _config(tmp_path_factory, "gpt2", "GPT2LMHeadModel", n_layer=1, n_embd=8, n_head=2, vocab_size=16)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> str:
    small = dict(num_channels=1, embedding_size=64, hidden_sizes=[12], depths=[1], layer_type="basic")
    return _config(tmp_path_factory, "resnet", "ResNetModel", **small)


def _config(factory: pytest.TempPathFactory, kind: str, model: str, **fields: Any) -> str:
    folder = factory.mktemp(kind)
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "architectures": [model], **fields}))
    return str(folder)


def test_the_base_tells_which_layers_are_fused(gpt2: str, tmp_path: Path) -> None:
    layer = loralib.MergedLinear(8, 24, r=2, lora_alpha=ALPHA, enable_lora=[False, False, True], fan_in_fan_out=True)
    path = saved(tmp_path / "a.pt", loralib.lora_state_dict(_layer("transformer.h.0.attn.c_attn", layer)))
    for enabled in (None, (False, True)):
        with pytest.raises(BadAdapterFile, match="is 3 layers in one, 1 of them adapted"):
            checkpoint.read(path, Told(alpha=ALPHA, base=gpt2, enabled=enabled))
    update = checkpoint.read(path, Told(alpha=ALPHA, base=gpt2, enabled=(False, False, True))).updates[0]
    torch.testing.assert_close(delta(update), (layer.merge_AB().T * layer.scaling).double(), rtol=1e-6, atol=1e-6)


def test_a_layer_whose_parts_are_all_adapted_needs_the_base_alone(gpt2: str, tmp_path: Path) -> None:
    layer = loralib.MergedLinear(8, 24, r=2, lora_alpha=ALPHA, enable_lora=[True] * 3)
    path = saved(tmp_path / "a.pt", loralib.lora_state_dict(_layer("transformer.h.0.attn.c_attn", layer)))
    update = checkpoint.read(path, Told(alpha=ALPHA, base=gpt2)).updates[0]
    torch.testing.assert_close(delta(update), (layer.merge_AB() * layer.scaling).double(), rtol=1e-6, atol=1e-6)


def test_the_base_tells_an_embedding_whatever_its_name(gpt2: str, tmp_path: Path) -> None:
    tensors = {}
    for path, (rows, out) in {"transformer.wpe": (1024, 8), "lm_head": (8, 16)}.items():
        tensors |= {f"{path}.lora_A": torch.randn(2, rows), f"{path}.lora_B": torch.randn(out, 2)}
    found = by_path(checkpoint.read(saved(tmp_path / "a.pt", tensors), Told(alpha=1.0, base=gpt2)))
    assert {path: each.form for path, each in found.items()} == {"transformer.wpe": "embedding", "lm_head": "linear"}


@pytest.mark.parametrize(
    ("path", "shapes", "reason"),
    [
        ("h.0.attn.c_attn", ((2, 8), (24, 2)), r"h\.0\.attn\.c_attn is no layer of .*transformer\.h\.0\.attn\.c_attn"),
        ("transformer.ln_f", ((2, 8), (8, 2)), "transformer.ln_f is a LayerNorm"),
        ("transformer.h.0.mlp.c_fc", ((2, 9), (32, 2)), "do not fit Conv1DLayout"),
        ("transformer.h.0.mlp.c_fc", ((2, 8), (31, 2)), "do not fit Conv1DLayout"),
        ("transformer.wte", ((2, 15), (8, 2)), "do not fit EmbeddingLayout"),
    ],
)
def test_what_the_base_does_not_have_is_said(
    gpt2: str, tmp_path: Path, path: str, shapes: tuple[tuple[int, int], tuple[int, int]], reason: str
) -> None:
    tensors = {f"{path}.lora_A": torch.ones(shapes[0]), f"{path}.lora_B": torch.ones(shapes[1])}
    with pytest.raises(BadAdapterFile, match=reason):
        checkpoint.read(saved(tmp_path / "a.pt", tensors), Told(alpha=1.0, base=gpt2))


CONVOLUTIONS = {  # path in the tiny ResNet -> channels in, channels out, kernel, r
    "encoder.stages.0.layers.0.shortcut.convolution": (64, 12, 1, 2),  # K = 1: a linear layer's
    "encoder.stages.0.layers.0.layer.0.convolution": (64, 12, 3, 1),
    "encoder.stages.0.layers.0.layer.1.convolution": (12, 12, 3, 2),  # r K² above the 12 that the kernel can have
    "embedder.embedder.convolution": (1, 64, 7, 2),  # and above 49
}


@pytest.mark.parametrize("path", CONVOLUTIONS)
def test_a_convolution_is_loralibs_own_kernel(resnet: str, tmp_path: Path, path: str) -> None:
    channels, out, k, rank = CONVOLUTIONS[path]
    layer = loralib.Conv2d(channels, out, kernel_size=k, r=rank, lora_alpha=ALPHA)
    file = saved(tmp_path / "a.pt", loralib.lora_state_dict(_layer(path, layer), bias="all"))
    exchange = checkpoint.read(file, Told(alpha=ALPHA, base=resnet))
    (update,) = exchange.updates
    assert update.form == "convolution" and set(exchange.whole) == {f"{path}.bias"}
    wanted = (layer.lora_B.double() @ layer.lora_A.double()).view(layer.conv.weight.shape) * layer.scaling
    found = torch.einsum("orxy,rihw->oihw", update.b.read().double(), update.a.read().double())
    assert (found * update.scale - wanted).norm() <= 1e-7 * wanted.norm()
    factored(exchange)  # its rank is one that the kernel can have


@pytest.mark.parametrize("path", list(CONVOLUTIONS)[:2])
def test_a_convolutions_matrices_come_back_to_the_bit(resnet: str, tmp_path: Path, path: str) -> None:
    channels, out, k, rank = CONVOLUTIONS[path]
    layer = loralib.Conv2d(channels, out, kernel_size=k, r=rank, lora_alpha=ALPHA)
    tensors = loralib.lora_state_dict(_layer(path, layer).half(), bias="all")
    exchange = checkpoint.read(saved(tmp_path / "a.pt", tensors), Told(alpha=ALPHA, base=resnet))
    assert "lora_alpha=6" in checkpoint.write(exchange, tmp_path / "b.pt", Told())[0]
    again = torch.load(tmp_path / "b.pt", weights_only=True)
    assert all(each.untyped_storage().nbytes() == each.nbytes for each in again.values())
    assert sorted(again) == sorted(tensors) and all(torch.equal(again[name], each) for name, each in tensors.items())


def test_loralibs_convolution_runs_one_of_pefts(tmp_path: Path) -> None:
    update = Update("c", value_of(torch.randn(2, 3, 3, 3)), value_of(torch.randn(5, 2, 1, 1)), 4.0, form="convolution")
    checkpoint.write(Exchange("peft", (update,)), tmp_path / "a.pt", Told())
    model = _layer("c", loralib.Conv2d(3, 5, kernel_size=3, r=2, lora_alpha=4))
    assert not model.load_state_dict(torch.load(tmp_path / "a.pt", weights_only=True), strict=False).unexpected_keys
    layer: Any = model.get_submodule("c")
    image = torch.randn(2, 3, 6, 6)
    kernel = layer.conv.weight.double() + delta(update).view(5, 3, 3, 3)
    wanted = F.conv2d(image.double(), kernel, layer.conv.bias.double())
    torch.testing.assert_close(layer(image).double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_kernel_that_is_not_square_is_refused(tmp_path: Path) -> None:
    update = Update("c", value_of(torch.randn(2, 3, 1, 3)), value_of(torch.randn(5, 2, 1, 1)), 4.0, form="convolution")
    with pytest.raises(BadAdapterFile, match="c has a kernel 1 x 3"):
        checkpoint.write(Exchange("peft", (update,)), tmp_path / "a.pt", Told())


@pytest.mark.parametrize("shapes", [((3, 64), (12, 3)), ((3, 192), (35, 3)), ((2, 192), (36, 2))])
def test_matrices_of_another_kernel_are_refused(resnet: str, tmp_path: Path, shapes: Any) -> None:
    path = "encoder.stages.0.layers.0.layer.0.convolution"
    tensors = {f"{path}.lora_A": torch.ones(shapes[0]), f"{path}.lora_B": torch.ones(shapes[1])}
    with pytest.raises(BadAdapterFile, match="do not fit Conv2dLayout"):
        checkpoint.read(saved(tmp_path / "a.pt", tensors), Told(alpha=1.0, base=resnet))

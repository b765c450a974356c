"""Full fine-tuning is fine-tuning: the same steps to the same bits, beside a base that keeps its own."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaModel
from transformers.modeling_layers import GradientCheckpointingLayer

import lorakit as lk
from lorakit.core.files import PREFIX, TENSORS, safe_open
from lorakit.core.state import adapter_tensors, deltas_of, idle
from lorakit.errors import BadAdapterFile, BadMethod, BadRouting, BadState
from lorakit.interop import merge_checkpoint
from lorakit.methods.full import Full, Trained, _Difference
from tests.laws.cases import bits, close, output, same_bits, scramble
from tests.tiny import tiny, tokens

MODELS = {
    "gpt2-large": (GPT2LMHeadModel, GPT2Config(n_layer=36, n_embd=1280, n_head=20)),
    "gpt2-medium": (GPT2LMHeadModel, GPT2Config(n_layer=24, n_embd=1024, n_head=16)),
    "roberta-base": (RobertaModel, RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)),
}


@pytest.mark.parametrize(
    ("name", "top", "parameters"),
    [
        ("gpt2-large", 0, 774_030_080),
        ("gpt2-medium", 0, 354_823_168),
        ("gpt2-medium", 2, 2 * (12 * 1024**2 + 13 * 1024)),
        ("roberta-base", 0, 124_645_632),
    ],
)
def test_trained_parameters_are_those_of_the_paper(name: str, top: int, parameters: int) -> None:
    kind, config = MODELS[name]
    with torch.device("meta"):
        model = kind(config)
        lk.attach(model, Full(top=top))
    told = lk.summary(model)
    assert told.trainable_parameters == parameters
    assert told.adapters[0].bytes_on_disk == 4 * parameters
    assert sum(row[-1] for row in told.adapters[0].rows) == parameters


def _train(model: nn.Module, parameters: list[nn.Parameter], steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for seed in range(steps):
        model(tokens(model, seed=seed))[0].pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("tied", [False, True])
def test_it_is_ordinary_fine_tuning_to_the_bit(tied: bool) -> None:
    plain, model = tiny("gpt2", tied=tied).train(), tiny("gpt2", tied=tied).train()
    before = bits(model)
    lk.attach(model, Full(), name="a")
    assert sum(p.numel() for p in lk.parameters(model)) == sum(p.numel() for p in plain.parameters())
    _train(plain, list(plain.parameters()))
    _train(model, lk.parameters(model))
    assert torch.equal(output(model), output(plain))
    with lk.use(model, None):
        assert torch.equal(output(model), output(tiny("gpt2", tied=tied)))
    assert same_bits({key: value for key, value in bits(model).items() if ".adapters." not in key}, before)
    lk.merge(model, "a")
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in plain.named_parameters())
    lk.unmerge(model)
    lk.detach(model, "a")
    assert same_bits(bits(model), before)


def test_the_last_blocks_alone_train() -> None:
    plain, model = tiny("gpt2"), tiny("gpt2")
    lk.attach(model, Full(top=1), name="a")
    _train(plain, list(plain.transformer.h[1].parameters()))
    _train(model, lk.parameters(model))
    assert torch.equal(output(model), output(plain))
    assert {delta.placement.path.split(".")[2] for delta in deltas_of(model, "a")} == {"1"}


def test_a_forward_that_fails_leaves_the_bases_weights() -> None:
    model = tiny("bert")
    lk.attach(model, Full(), name="a")
    scramble(model, "a")
    expected, before = output(model), {name: id(p) for name, p in model.named_parameters()}
    broken = model.encoder.layer[1].output.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        output(model)
    broken.remove()
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert torch.equal(output(model), expected)


def test_weights_that_are_read_without_a_call_are_stood_in_for() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)  # reads out_proj.weight, never calls it
            self.scales = nn.ParameterList([torch.ones(8)])  # is never called

        def forward(self, x_BTI: torch.Tensor) -> torch.Tensor:
            return self.attention(x_BTI, x_BTI, x_BTI)[0] * self.scales[0]

    torch.manual_seed(0)
    model, x_BTI = nn.Sequential(Attending()), torch.randn(2, 3, 8)
    plain = copy.deepcopy(model)
    lk.attach(model, Full(), name="a")
    for each, parameters in ((model, lk.parameters(model)), (plain, list(plain.parameters()))):
        each(x_BTI).pow(2).sum().backward()
        torch.optim.SGD(parameters, lr=0.1).step()
    assert torch.equal(model(x_BTI), plain(x_BTI))
    assert idle(model, "a") == []
    lk.merge(model, "a")
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in plain.named_parameters())


class Scaled(GradientCheckpointingLayer):
    """A block that holds a weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale_O = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x_BI: torch.Tensor) -> torch.Tensor:
        return x_BI + self.linear(x_BI) * self.scale_O


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_weight_that_checkpointing_would_miss_is_refused(reentrant: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Scaled()).train()
    lk.attach(model, Full(), name="a")
    model(torch.ones(2, 4)).sum().backward()
    model[1].gradient_checkpointing = True
    model[1]._gradient_checkpointing_func = partial(checkpoint, use_reentrant=reentrant)
    with pytest.raises(BadState, match="1 holds weights of its own"):
        model(torch.ones(2, 4))
    model.eval()(torch.ones(2, 4))


def test_relative_positions_of_a_stack_are_trained() -> None:
    model = tiny("deberta-v2")
    lk.attach(model, Full(), name="a")
    output(model).pow(2).sum().backward()
    value = adapter_tensors(model, "a")["encoder.other.trained.rel_embeddings/weight.value"]
    assert value.grad is not None and bool(value.grad.any())


def _numbers(count: int = 4000) -> torch.Tensor:
    """float32 numbers of every size, some of them alike."""
    generator = torch.Generator().manual_seed(0)
    sizes = 10.0 ** torch.randint(-30, 8, (count,), generator=generator).double()
    found = (torch.randn(count, generator=generator, dtype=torch.float64) * sizes).float()
    found[:4] = torch.tensor([0.0, -0.0, 1.0, 1e-40])
    return found


def test_base_and_difference_give_the_value_to_the_bit() -> None:
    some = _numbers()
    base = some.repeat(7)
    value = torch.cat([some.roll(n) * factor for n, factor in enumerate((1, 1, -1, 2.1, 0.3, 1, 1))])
    value[-len(some) :] = some + 0.1 * some.abs() * torch.randn(len(some), generator=torch.Generator().manual_seed(1))
    one, other = Trained(base), Trained(base)
    one.begin(value)
    told = one.difference(base)
    assert torch.equal(told["difference"], value - base)
    assert 0 < len(told["rest"]) < len(base)
    other.become(_Difference(**told), base)
    assert torch.equal(other.value, value)
    again = other.difference(base)
    assert all(again[key].numpy().tobytes() == told[key].numpy().tobytes() for key in told)


def _saved(folder: Path, **options: object) -> nn.Module:
    model = tiny("gpt2", **options)
    lk.attach(model, Full(), name="a")
    scramble(model, "a", std=0.3)
    with torch.no_grad():
        for value in adapter_tensors(model, "a").values():
            value *= 0.1  # finer numbers than the base's, so that a difference alone would not be enough
    lk.save(model, "a", folder)
    return model


def test_the_file_holds_differences_and_tied_weights_once(tmp_path: Path) -> None:
    model = _saved(tmp_path / "a", tied=True)
    tensors = {key.removeprefix(PREFIX): value for key, value in load_file(tmp_path / "a" / TENSORS).items()}
    differences = {key.removesuffix(".difference"): v for key, v in tensors.items() if key.endswith(".difference")}
    base = tiny("gpt2", tied=True)
    assert differences.keys() == dict(base.named_parameters()).keys()
    lk.merge(model, "a")
    for name, value in base.named_parameters():
        assert torch.equal(differences[name], model.get_parameter(name) - value), name
    lk.save(model, "a", tmp_path / "merged")
    assert (tmp_path / "merged" / TENSORS).read_bytes() == (tmp_path / "a" / TENSORS).read_bytes()


def test_another_adapters_merge_does_not_change_what_is_saved(tmp_path: Path) -> None:
    model = _saved(tmp_path / "a")
    lk.attach(model, lk.LoRA(targets="attn.o"), name="b")
    scramble(model, "b")
    lk.merge(model, "b")
    lk.save(model, "a", tmp_path / "merged")
    assert (tmp_path / "merged" / TENSORS).read_bytes() == (tmp_path / "a" / TENSORS).read_bytes()


def test_a_rounded_base_takes_the_difference(tmp_path: Path) -> None:
    model, rounded = _saved(tmp_path / "a"), tiny("gpt2", torch.bfloat16)
    lk.load(rounded, tmp_path / "a", "a")
    assert close(output(rounded).float(), output(model), 0.05)
    with pytest.raises(BadAdapterFile, match="another base"):
        lk.load(tiny("gpt2", seed=1), tmp_path / "a", "a")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, at: t.pop(at.replace("rest_at", "difference")), "c_attn.weight.difference is missing"),
        (lambda t, at: t.update({at.replace("rest_at", "difference"): torch.zeros(2)}), r"has shape \(2,\)"),
        (lambda t, at: t.pop(at), "do not belong together"),
        (lambda t, at: t.update({at: t[at][:-1]}), "do not belong together"),
        (lambda t, at: t.update({at: t[at].float()}), "names places"),
        (lambda t, at: t[at].fill_(-1), "names places"),
        (lambda t, at: t[at].fill_(32 * 96), "names places"),
        (lambda t, at: t.update({f"{at}_more": torch.zeros(2)}), "rest_at_more is not part of it"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(change, words: str, tmp_path: Path) -> None:
    _saved(tmp_path)
    tensors, at = load_file(tmp_path / TENSORS), "base_model.model.transformer.h.0.attn.c_attn.weight.rest_at"
    with safe_open(tmp_path / TENSORS, framework="pt") as file:
        metadata = file.metadata()
    change(tensors, at)
    save_file(tensors, tmp_path / TENSORS, metadata=metadata)
    model = tiny("gpt2")
    with pytest.raises(BadAdapterFile, match=words):
        lk.load(model, tmp_path)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_on_disk_becomes_the_trained_one(tied: bool, tmp_path: Path) -> None:
    model = _saved(tmp_path / "a", tied=tied)
    tiny("gpt2", tied=tied).save_pretrained(tmp_path / "base")
    merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    lk.merge(model, "a")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in again.named_parameters())


def test_a_head_is_trained_apart_and_saved_whole(tmp_path: Path) -> None:
    model = tiny("bert", labels=3)
    lk.attach(model, Full(train="classifier"), name="a")
    scramble(model, "a")
    lk.save(model, "a", tmp_path / "a")
    other = tiny("bert", labels=3)
    nn.init.normal_(other.classifier.weight)  # a new head is different each time
    lk.load(other, tmp_path / "a", "a")
    assert torch.equal(output(other), output(model))
    assert sum(p.numel() for p in lk.parameters(model)) == sum(p.numel() for p in tiny("bert", labels=3).parameters())


@pytest.mark.parametrize("train", ["wpe", "mlp.up", "embed,norm.attn"])
def test_modules_trained_apart_are_not_stood_in_for(train: str, tmp_path: Path) -> None:
    model = tiny("gpt2")
    lk.attach(model, Full(train=train), name="a")
    assert sum(p.numel() for p in lk.parameters(model)) == sum(p.numel() for p in tiny("gpt2").parameters())
    scramble(model, "a")
    attached = output(model)
    lk.save(model, "a", tmp_path / "a")
    other = tiny("gpt2")
    lk.load(other, tmp_path / "a", "a")
    assert torch.equal(output(other), attached)
    lk.merge(model, "a")
    assert close(output(model), attached)


def test_rows_and_mixtures_are_refused() -> None:
    model = tiny("gpt2")
    for name in "ab":
        lk.attach(model, Full(), name=name)
    for what in (["a", "b"], {"a": 0.5, "b": 0.5}):
        with pytest.raises(BadRouting):
            lk.use(model, what)


def test_what_cannot_be_trained_is_refused() -> None:
    class Rooted(nn.Linear):
        """A model that holds its weight itself."""

    quantised = nn.Sequential(nn.Linear(3, 3))
    quantised[0].weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)
    for model, method, words in (
        (tiny("gpt2"), Full(top=3), "more blocks than the 2"),
        (Rooted(2, 2), Full(), "itself holds weights"),
        (quantised, Full(), "int8, which cannot be trained"),
    ):
        with pytest.raises(BadMethod, match=words):
            lk.attach(model, method)
    with pytest.raises(BadMethod, match="top=-1"):
        Full(top=-1)

"""What an adapter does on given text, against the definitions: layers by hand, whole runs by two forwards."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForPreTraining

import lorakit as lk
from lorakit.analyse.divergence import divergence
from lorakit.analyse.effect import Effect, effect
from lorakit.core.routing import use
from lorakit.core.sites import sites_of
from lorakit.core.state import adapters_of
from lorakit.errors import BadData, BadState, NoSuchAdapter
from tests.laws.cases import CANNOT, METHODS
from tests.tiny import inputs, tiny


def adapted(family: str = "llama", method: Any = None, **fields: Any) -> Any:
    """A tiny model with an adapter away from zero."""
    model = tiny(family, **fields)
    lk.attach(model, method or lk.LoRA(rank=2, targets=("attention", "mlp")), name="a")
    torch.manual_seed(1)
    for parameter in lk.parameters(model):
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def batch_of(model: Any, lengths: tuple[int, ...] = (7, 4), seed: int = 0) -> dict[str, Tensor]:
    """Rows of these lengths, padded on the right."""
    given = inputs(model, rows=len(lengths), length=max(lengths), seed=seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return given | {"attention_mask": mask.long()}


@torch.no_grad()
def seen(model: Any, what: str | None, given: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of every module on the base or the adapter."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def take(path: str, module: Any, args: Any, kwargs: Any) -> None:
        found[path] = args[0] if args else next(iter(kwargs.values()), None), torch.empty(0)

    def keep(path: str, module: Any, args: Any, output: Any) -> None:
        found[path] = found[path][0], output[0] if isinstance(output, tuple) else output

    modules = [(path, module) for path, module in model.named_modules() if path]
    hooks = [m.register_forward_pre_hook(partial(take, path), prepend=True, with_kwargs=True) for path, m in modules]
    hooks += [m.register_forward_hook(partial(keep, path)) for path, m in modules]
    with use(model, what):
        model(**given)
    for hook in hooks:
        hook.remove()
    return found


def rows_of(x: Tensor, mask: Tensor | None) -> Tensor:
    return x[mask.bool()] if mask is not None else x.flatten(0, -2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "bert"])
def test_local_is_what_a_layer_adds_to_its_own_output_for_the_input_that_it_gets(family: str) -> None:
    model = adapted(family)
    given = batch_of(model)
    found, run = effect(model, "a", [given]), seen(model, "a", given)
    assert [layer.path for layer in found.layers] == [path for path, _, _ in adapters_of(model)]
    for layer in found.layers:
        module, (x, y) = model.get_submodule(layer.path), run[layer.path]
        with torch.no_grad():
            base = rows_of(module.forward(x), given["attention_mask"])
        added = rows_of(y, given["attention_mask"]) - base
        assert layer.positions == 11
        assert layer.local == pytest.approx(float(added.norm() / base.norm()), rel=1e-4) and layer.local > 0.01
        assert torch.allclose(layer.added_O, added.square().mean(0).sqrt(), rtol=1e-3, atol=1e-6)
        assert torch.allclose(layer.base_O, base.square().mean(0).sqrt(), rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_heads_share_a_layers_units_out(family: str) -> None:
    model = adapted(family, lk.LoRA(rank=2, targets=("attn.q", "attn.v")))
    given = batch_of(model, (5, 5))
    found, run = effect(model, "a", [given]), seen(model, "a", given)
    layers = {layer.path: layer for layer in found.layers}
    counts = {"attn.q": 4, "attn.k": 2 if family == "llama" else 4, "attn.v": 2 if family == "llama" else 4}
    for site in sites_of(model):
        if site.path in layers and site.role in counts:
            module, (x, y) = model.get_submodule(site.path), run[site.path]
            with torch.no_grad():
                base = module.forward(x)
            parts = [each if site.slice is None else site.slice.take(each) for each in (y - base, base)]
            added, own = (part.unflatten(-1, (counts[site.role], -1)).square().sum((0, 1, 3)) for part in parts)
            heads = layers[site.path].heads[site.role]
            assert torch.allclose(heads, (added / own).sqrt(), rtol=1e-3) and len(heads) == counts[site.role]
            assert bool(heads.any()) == (site.role != "attn.k")


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_drift_is_the_change_of_whole_runs(family: str) -> None:
    model = adapted(family)
    given = batch_of(model)
    found, base, run = effect(model, "a", [given]), seen(model, None, given), seen(model, "a", given)
    mask = given["attention_mask"]
    blocks = [site.path for site in sites_of(model) if site.role == "block"]
    assert [block.path for block in found.blocks] == blocks and [block.layer for block in found.blocks] == [0, 1]
    for block in found.blocks:
        before, after = (rows_of(each[block.path][1], mask) for each in (base, run))
        assert block.drift == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)
    for head in found.heads:
        before, after = (rows_of(each[head.path][0], mask).unflatten(-1, (4, 8)) for each in (base, run))
        wanted = (after - before).square().sum((0, 2)) / before.square().sum((0, 2))
        assert torch.allclose(head.heads_H, wanted.sqrt(), rtol=1e-3)
    assert len(found.heads) == 2
    assert found.tokens is not None
    before, after = (rows_of(each[blocks[-1]][1], mask) for each in (base, run))
    moved, ids = (after - before).norm(dim=1) / before.norm(dim=1), given["input_ids"][mask.bool()]
    assert found.tokens.ids_V.tolist() == sorted(set(ids.tolist()))
    for token, count, drift in zip(found.tokens.ids_V, found.tokens.counts_V, found.tokens.drift_V, strict=True):
        assert count == (ids == token).sum()
        assert float(drift) == pytest.approx(float(moved[ids == token].mean()), rel=1e-4)


def test_divergence_is_that_of_what_is_predicted() -> None:
    model = adapted()
    given = batch_of(model)
    found, mask = effect(model, "a", [given]), given["attention_mask"].bool()
    with torch.no_grad():
        logs = []
        for what in (None, "a"):
            with use(model, what):
                logs.append(model(**given).logits[mask].double().log_softmax(-1))
    wanted = (logs[1].exp() * (logs[1] - logs[0])).sum(-1)
    assert found.divergence == pytest.approx(float(wanted.mean()), rel=1e-4) and found.divergence > 0.01
    assert found.tokens is not None and found.tokens.divergence_V is not None
    ids = given["input_ids"][mask]
    for token, each in zip(found.tokens.ids_V, found.tokens.divergence_V, strict=True):
        assert float(each) == pytest.approx(float(wanted[ids == token].mean()), rel=1e-3, abs=1e-6)


def test_divergence_survives_what_cannot_happen_and_is_never_below_zero() -> None:
    base, after = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.0, 1.0, -torch.inf]])
    assert 0 < float(divergence(base, after)) < torch.inf
    assert float(divergence(after, base)) == torch.inf
    same = torch.randn(600, 50, generator=torch.Generator().manual_seed(0)) * 10
    assert not divergence(same, same).any() and len(divergence(same, same)) == 600
    assert (divergence(same, same + 1e-6) >= 0).all()


def same(one: Effect, other: Effect) -> bool:
    pairs = [(a.local, b.local) for a, b in zip(one.layers, other.layers, strict=True)]
    pairs += [(a.drift, b.drift) for a, b in zip((*one.blocks, *one.heads), (*other.blocks, *other.heads), strict=True)]
    assert one.tokens is not None and other.tokens is not None
    whole = torch.equal(one.tokens.counts_V, other.tokens.counts_V)
    return whole and all(a == pytest.approx(b, rel=1e-4) for a, b in pairs) and one.divergence == pytest.approx(
        other.divergence, rel=1e-4
    )  # fmt: skip


def test_padding_and_the_division_into_batches_do_not_count() -> None:
    model = adapted()
    whole = batch_of(model, (7, 4, 5))
    alone = [
        {key: value[row : row + 1, :length] for key, value in whole.items()} for row, length in enumerate((7, 4, 5))
    ]
    assert same(effect(model, "a", [whole]), effect(model, "a", alone))
    other = batch_of(model, (3,), seed=5)
    assert not same(effect(model, "a", [whole]), effect(model, "a", iter([whole, other])))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not any(method.inserts)])
def test_a_layer_that_gets_the_same_input_moves_by_what_the_adapter_adds(family: str, name: str) -> None:
    """Whatever a method does: to inputs, to outputs, in place of weights, on whole blocks."""
    if (family, name) in CANNOT:
        pytest.skip(CANNOT[family, name])
    model = adapted(family, METHODS[name])
    given = batch_of(model, (5, 5))
    found, base, run = effect(model, "a", [given]), seen(model, None, given), seen(model, "a", given)
    paths = [layer.path for layer in found.layers if torch.equal(base[layer.path][0], run[layer.path][0])]
    assert paths or name == "full"  # embeddings are replaced from further up: see below
    for layer in found.layers:
        if layer.path in paths:
            before, after = base[layer.path][1], run[layer.path][1]
            wanted = float((after - before).norm() / before.norm())
            assert layer.local == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    assert max(layer.local for layer in found.layers) > 1e-3


def test_a_layer_whose_weights_are_replaced_from_further_up_has_no_base_to_tell() -> None:
    model = adapted("llama", lk.Full())
    given = batch_of(model, (5, 5))
    found, run = effect(model, "a", [given]), seen(model, "a", given)
    layers = {layer.path: layer.local for layer in found.layers}
    assert not {"model", "model.embed_tokens", "model.norm"} & layers.keys()
    for path in ("lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.input_layernorm"):
        (x, y), module = run[path], model.get_submodule(path)
        with use(model, None), torch.no_grad():
            base = module(x)
        assert layers[path] == pytest.approx(float((y - base).norm() / base.norm()), rel=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "t5", "vit", "phi3"])
def test_other_kinds_of_models(family: str) -> None:
    targets = ("attn.q", "mlp.down") if family == "mixtral" else ("attention", "mlp")
    model = adapted(family, lk.LoRA(rank=2, targets=targets))
    given = inputs(model)
    found, base, run = effect(model, "a", [given]), seen(model, None, given), seen(model, "a", given)
    assert all(layer.local > 0.01 for layer in found.layers)
    blocks = [site.path for site in sites_of(model) if site.role == "block"]
    for path, block in zip(blocks, found.blocks, strict=True):
        before, after = base[path][1], run[path][1]
        assert block.drift == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)
    assert (found.tokens is None) == (family == "vit") and (found.divergence is None) == (family == "vit")
    if family == "t5":
        assert found.tokens is not None
        assert found.tokens.ids_V.tolist() == sorted(set(given["decoder_input_ids"].flatten().tolist()))


def test_a_fresh_adapter_moves_nothing() -> None:
    model = tiny("bert")
    lk.attach(model, lk.LoRA(rank=2, targets=("linear",)), name="a")
    found = effect(model, "a", [batch_of(model)])
    assert not any(layer.local or layer.added_O.any() for layer in found.layers)
    assert not any(each.drift or each.heads_H.any() for each in (*found.blocks, *found.heads))
    assert found.tokens is not None and not found.tokens.drift_V.any() and found.divergence is None


def test_a_head_that_gives_no_logits_is_left_alone() -> None:
    model = AutoModelForPreTraining.from_config(tiny("bert").config)
    lk.attach(model, lk.LoRA(rank=2, targets=("attn.q",)), name="a")
    found = effect(model, "a", [batch_of(model)])
    assert found.tokens is not None and found.tokens.divergence_V is None


def test_a_convolution_is_told_by_its_channels() -> None:
    model = adapted("vit", lk.LoRA(rank=2, targets=("projection",)))
    given = inputs(model)
    found, base, run = effect(model, "a", [given]), seen(model, None, given), seen(model, "a", given)
    (layer,) = found.layers
    added = run[layer.path][1] - base[layer.path][1]
    assert torch.allclose(layer.added_O, added.square().mean((0, 2, 3)).sqrt(), rtol=1e-3)
    assert layer.positions == 3 * 4


def test_the_model_is_as_it_was() -> None:
    model = adapted().train()
    lk.attach(model, lk.LoRA(rank=2), name="other")
    given = batch_of(model)
    counts = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in model.modules()]
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    found = effect(model, "a", [given])
    assert not any(each.added_O.requires_grad for each in found.layers)
    with pytest.raises(RuntimeError):
        effect(model, "a", [{"input_ids": given["input_ids"].float()}])
    assert counts == [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in model.modules()]
    assert gradients == [parameter.requires_grad for parameter in model.parameters()]
    with torch.no_grad():
        present = model.eval()(**given).logits
        with use(model, "other"):
            assert torch.equal(model(**given).logits, present)


def test_what_cannot_be_told_is_refused() -> None:
    model, given = adapted(), batch_of(adapted())
    with pytest.raises(NoSuchAdapter, match="'b'"):
        effect(model, "b", [given])
    with pytest.raises(BadData, match=r"no batch reached .*q_proj"):
        effect(model, "a", [])
    with pytest.raises(BadData, match="batch 1 is a list"):
        effect(model, "a", [given["input_ids"].tolist()])  # type: ignore[list-item]
    lk.attach(model, lk.PrefixEmbedding(prefix=2), name="prefix")
    with pytest.raises(BadState, match="places of its own"):
        effect(model, "prefix", [given])
    with torch.no_grad():
        lk.parameters(model, "a")[0].fill_(float("nan"))
    with pytest.raises(BadData, match=r"NaN or infinity at model\.layers\.0"):
        effect(model, "a", [given])
    merged = adapted()
    lk.merge(merged, "a")
    with pytest.raises(BadState, match="merged"):
        effect(merged, "a", [given])

"""Calibration: moments are those of the whole data, and the model is as it was."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

import lorakit as lk
from lorakit.core.calibrate import calibrate
from lorakit.core.layouts import layout_of
from lorakit.core.sites import Site, resolve
from lorakit.core.statistics import FOLDS, NEEDS, Running, SiteStatistics, merged
from lorakit.errors import BadData, BadMethod, BadState, UnknownName
from tests.laws.cases import close
from tests.tiny import tiny, tokens

Batch = dict[str, Tensor]


def data(model: Any, rows: int = 10, length: int = 7) -> Batch:
    """Rows of several lengths, padded on the right, each token to be predicted."""
    ids = tokens(model, rows, length)
    lengths = torch.tensor([length - row % 4 for row in range(rows)])
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}


def split(batch: Batch, *sizes: int) -> list[Batch]:
    parts = [value.split(list(sizes)) for value in batch.values()]
    return [dict(zip(batch, each, strict=True)) for each in zip(*parts, strict=True)]


def seen(model: nn.Module, site: Site, batch: Batch) -> tuple[Tensor, Tensor]:
    """What one layer sees and gives at the positions that count, in float64, by a hook of the test's own."""
    kept: list[Tensor] = []
    hook = model.get_submodule(site.path).register_forward_hook(lambda _, args, y: kept.extend((args[0], y)))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    x, y = (each[batch["attention_mask"].bool()].double() for each in kept)
    return x, y if site.slice is None else site.slice.take(y)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("sizes", [(10,), (1, 6, 3)], ids=str)
def test_moments_are_those_of_all_data_together(family: str, sizes: tuple[int, ...]) -> None:
    model = tiny(family)
    whole, sites = data(model), resolve(model, ["attention", "mlp.down"])
    if family == "bert":
        del whole["labels"]
    found = calibrate(model, sites, split(whole, *sizes), needs=("inputs", "outputs", "norms", "folds"))
    assert list(found) == [(site.path, site.slice) for site in sites]
    for site in sites:
        ours, (x, y) = found[site.path, site.slice], seen(model, site, whole)
        assert ours.tokens == len(x)
        assert ours.shape == (y.shape[1], x.shape[1])
        for moment, values in ((ours.inputs, x), (ours.outputs, y), (merged(ours.folds), x)):
            assert moment is not None
            assert close(moment.mean_D, values.mean(0))
            assert close(moment.covariance_DD, values.T.cov(correction=0))
            assert close(moment.second, values.T @ values / len(values))
        assert ours.norm_in == pytest.approx(float(x.norm(dim=1).mean()), rel=1e-5)
        module = model.get_submodule(site.path)
        bias = torch.zeros(len(module.weight)) if getattr(module, "bias", None) is None else module.bias.detach()
        plain = y - (bias if site.slice is None else site.slice.take(bias)).double()
        assert ours.norm_out == pytest.approx(float(plain.norm(dim=1).mean()), rel=1e-5)


def test_large_means_do_not_drown_the_covariance() -> None:
    x = torch.randn(400, 5) + 1000
    running = Running()
    for part in x.split(37):
        running.add(part)
    reference = x.double().T.cov(correction=0)
    assert close(running.moment().covariance_DD, reference, 1e-4)
    naive = x.T @ x / 400 - torch.outer(x.mean(0), x.mean(0))
    assert not close(naive, reference, 1e-2)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_are_the_mean_over_batches(family: str) -> None:
    model = tiny(family)
    batches, sites = split(data(model), 4, 6), resolve(model, ["attn.q", "attn.v", "mlp.down"])
    found = calibrate(model, sites, batches, needs=("gradient",))
    for site in sites:
        module = model.get_submodule(site.path)
        grads = [torch.autograd.grad(model(**batch).loss, module.weight)[0] for batch in batches]
        assert site.layout is not None
        reference = site.layout.matrix(torch.stack(grads).mean(0))
        gradient = found[site.path, site.slice].gradient_OI
        assert gradient is not None
        assert close(gradient, reference if site.slice is None else site.slice.take(reference, 0))


def test_error_moments_are_those_of_the_outputs_gradients() -> None:
    model, felt = tiny("gpt2"), []
    (site,) = resolve(model, ["h.1.attn.c_proj"])
    batches = split(data(model), 4, 6)
    found = calibrate(model, [site], batches, needs=("errors",))[site.path, None].errors

    def keep(_: nn.Module, __: Any, y: Tensor) -> None:
        y.register_hook(lambda gradient: felt.append(gradient.clone()))

    hook = model.get_submodule(site.path).register_forward_hook(keep)
    for batch in batches:
        model(**batch).loss.backward()
    hook.remove()
    deltas = torch.cat([g[b["attention_mask"].bool()] for g, b in zip(felt, batches, strict=True)]).double()
    assert found is not None and found.tokens == len(deltas)
    assert close(found.second, deltas.T @ deltas / len(deltas))


def test_a_loss_of_ones_own() -> None:
    model = tiny("llama")
    (site,) = resolve(model, ["layers.1.mlp.down_proj"])

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(batch["input_ids"]).logits.square().sum()

    ids = tokens(model)
    found = calibrate(model, [site], [{"input_ids": ids}], needs=("gradient",), loss=loss)
    weight = model.get_parameter(f"{site.path}.weight")
    (reference,) = torch.autograd.grad(loss(model, {"input_ids": ids}), weight)
    gradient = found[site.path, None].gradient_OI
    assert gradient is not None and close(gradient, reference)


class InPlace(nn.Module):
    """Writes into a layer's output, as models do with residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        y *= 2
        return y.square().sum()


def test_outputs_may_be_written_in_place() -> None:
    model, x = InPlace(), torch.randn(4, 3)
    site = Site("layer", "other", None, layout_of(model.layer))
    found = calibrate(model, [site], [{"x": x}], needs=("gradient",), loss=lambda model, batch: model(**batch))
    (reference,) = torch.autograd.grad(model(x), model.layer.weight)
    gradient = found["layer", None].gradient_OI
    assert gradient is not None and close(gradient, reference)


def test_folds_hold_whole_sequences_and_do_not_depend_on_batches() -> None:
    model = tiny("llama")
    sites = resolve(model, ["attn.q"])
    one = calibrate(model, sites, [data(model)], needs=("folds",))
    other = calibrate(model, sites, split(data(model), 3, 3, 4), needs=("folds",))
    lengths = data(model)["attention_mask"].sum(1)
    expected = [int(lengths[fold::FOLDS].sum()) for fold in range(FOLDS)]
    for key, found in one.items():
        assert [fold.tokens for fold in found.folds] == expected
        for ours, theirs in zip(found.folds, other[key].folds, strict=True):
            assert close(ours.covariance_DD, theirs.covariance_DD)


def test_layers_that_see_one_tensor_share_its_moment() -> None:
    model = tiny("llama")
    q, k, o = (f"model.layers.0.self_attn.{name}_proj" for name in "qko")
    sites = resolve(model, ["linear"])
    shared, apart = (calibrate(model, sites, [data(model)], share=share) for share in (True, False))
    assert shared[q, None].inputs is shared[k, None].inputs is not shared[o, None].inputs
    assert apart[q, None].inputs is not apart[k, None].inputs
    for key, found in shared.items():
        theirs = apart[key].inputs
        assert found.inputs is not None and theirs is not None
        assert torch.equal(found.inputs.covariance_DD, theirs.covariance_DD)


class Fickle(nn.Module):
    """Its second layer sees the first one's input in some batches only."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor, apart: bool = False, skip: bool = False) -> Tensor:
        return self.one(x) if skip else self.one(x) + self.two(x + 1 if apart else x)


@pytest.mark.parametrize("strange", [{"apart": True}, {"skip": True}], ids=str)
def test_layers_that_stop_sharing_are_noticed(strange: dict[str, bool]) -> None:
    model, x = Fickle(), torch.randn(4, 3)
    sites = [Site(path, "other", None, layout_of(model.get_submodule(path))) for path in ("one", "two")]
    batches = [{"x": x}, {"x": 2 * x, **strange}]
    with pytest.raises(BadData, match=r"two saw .* one .* share=False"):
        calibrate(model, sites, batches)
    found = calibrate(model, sites, batches, share=False)["two", None].inputs
    reference = x if "skip" in strange else torch.cat([x, 2 * x + 1])
    assert found is not None and close(found.mean_D, reference.mean(0))


def test_a_layer_that_is_called_twice_counts_twice() -> None:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, layer)
    x = torch.randn(4, 3)
    found = calibrate(model, [Site("0", "other", None, layout_of(layer))], [{"input": x}])["0", None]
    assert found.inputs is not None and found.tokens == 8
    assert close(found.inputs.mean_D, torch.cat([x, layer(x)]).mean(0))


def test_labelled_positions_alone_where_that_is_asked() -> None:
    model, batch = tiny("llama"), data(tiny("llama"))
    batch["labels"][:, :3] = -100
    site = resolve(model, ["attn.q"])[0]
    found = calibrate(model, [site], [batch], labelled_only=True)[site.path, None].inputs
    x, _ = seen(model, site, {**batch, "attention_mask": batch["attention_mask"]})
    wanted = (batch["labels"] != -100)[batch["attention_mask"].bool()]
    assert found is not None and close(found.mean_D, x[wanted].mean(0))
    with pytest.raises(BadData, match="batch 1 has no labels"):
        calibrate(model, [site], [{"input_ids": batch["input_ids"]}], labelled_only=True)


def t5() -> T5ForConditionalGeneration:
    sizes = dict(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=32, decoder_start_token_id=0)
    return T5ForConditionalGeneration(T5Config(**sizes)).eval()


def test_encoder_and_decoder_have_masks_of_their_own() -> None:
    model = t5()
    paths = ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q"]
    paths += ["decoder.block.0.layer.1.EncDecAttention.k"]
    sites = [Site(path, "other", None, layout_of(model.get_submodule(path))) for path in paths]
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    batch = {"input_ids": torch.ones(2, 5).long(), "attention_mask": mask, "labels": torch.tensor([[5, 6, -100]] * 2)}
    found = calibrate(model, sites, [batch])
    assert [found[path, None].tokens for path in paths] == [6, 4, 6]
    batch["labels"] = torch.tensor([[5, 6, 7, -100, -100]] * 2)
    with pytest.raises(BadData, match=r"one shape \(2, 5\)"):
        calibrate(model, sites, [batch])


def test_adapters_in_force_act_in_calibration() -> None:
    model = tiny("llama")
    lk.attach(model, lk.LoRA(rank=2), name="a")
    for parameter in lk.parameters(model, "a"):
        nn.init.normal_(parameter)
    (site,) = resolve(model, ["layers.1.self_attn.o_proj"])
    adapted = calibrate(model, [site], [data(model)])[site.path, None].inputs
    with lk.use(model, None):
        plain = calibrate(model, [site], [data(model)])[site.path, None].inputs
    x, _ = seen(model, site, data(model))
    assert adapted is not None and plain is not None
    assert close(adapted.mean_D, x.mean(0)) and not close(plain.mean_D, x.mean(0), 1e-2)
    gradient = calibrate(model, [site], [data(model)], needs=("gradient",))[site.path, None].gradient_OI
    weight = model.get_parameter(f"{site.path}.weight").requires_grad_()
    (reference,) = torch.autograd.grad(model(**data(model)).loss, weight)
    assert gradient is not None and close(gradient, reference)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in lk.parameters(model, "a"))


def snapshot(model: nn.Module) -> list[Any]:
    """Everything about a model that calibration could leave behind."""
    modules = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    flags = [(p.requires_grad, p.grad is None or p.grad.clone().tolist()) for p in model.parameters()]
    return [modules, flags, [value.tolist() for value in model.state_dict().values()]]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("needs", NEEDS)
def test_the_model_is_as_it_was(needs: str, fails: bool) -> None:
    model = tiny("llama").train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones(32)
    before, batches = snapshot(model), [data(model)]
    if fails:
        with pytest.raises(BadData):
            calibrate(model, resolve(model, ["linear"]), [*batches, [1, 2]], needs=(needs,))  # type: ignore[list-item]
    else:
        calibrate(model, resolve(model, ["linear"]), batches, needs=(needs,))
    assert snapshot(model) == before


def test_nothing_of_a_batch_outlives_it() -> None:
    """The only tensors that stay are the moments, whose sizes are those of the layers."""
    model, live, alive = tiny("llama"), [], []
    sites = resolve(model, ["linear"])

    def batches() -> Iterator[Batch]:
        for number in range(4):
            alive.append(sum(ref() is not None for ref in live))
            live.clear()
            yield {key: value.clone() for key, value in data(model, rows=2 + number).items()}

    hooks = [
        module.register_forward_hook(lambda _, args, y: live.extend(weakref.ref(t) for t in (*args, y)))
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    calibrate(model, sites, batches(), needs=NEEDS)
    for hook in hooks:
        hook.remove()
    assert alive == [0, 0, 0, 0] and len(live) > 20


def test_other_forwards_are_not_listened_to() -> None:
    model = tiny("llama")
    site = resolve(model, ["attn.q"])[0]

    def batches() -> Iterator[Batch]:
        for batch in split(data(model), 5, 5):
            model(**data(model, rows=3))
            yield batch

    found, plain = (calibrate(model, [site], each)[site.path, None] for each in (batches(), [data(model)]))
    assert found.tokens == plain.tokens


def test_nan_is_named_with_its_batch_and_layer() -> None:
    model = tiny("llama")
    good = torch.randn(2, 4, 32)
    bad = good.clone()
    bad[1, 2, 3] = torch.nan
    with pytest.raises(BadData, match=r"batch 2 gives NaN or infinity at model\.layers\.0\.self_attn\.k_proj"):
        calibrate(model, resolve(model, ["attn.k", "attn.o"]), [{"inputs_embeds": good}, {"inputs_embeds": bad}])


def test_infinite_gradients_are_named() -> None:
    model = tiny("llama")

    def loss(model: nn.Module, batch: Any) -> Tensor:
        logits = model(**batch).logits
        return (logits * 0).sqrt().sum()

    with pytest.raises(BadData, match=r"batch 1 gives NaN or infinity at .*layers\.1"):
        calibrate(model, resolve(model, ["attn.q"]), [{"input_ids": tokens(model)}], needs=("gradient",), loss=loss)


def _endless(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).logits.sum() * torch.inf


def _vector(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).logits.sum((1, 2))


def _constant(model: nn.Module, batch: Any) -> Tensor:
    model(**batch)
    return torch.ones(())


MISUSES = {
    "nothing": (dict(batches=[]), BadData, "there is no calibration batch"),
    "no rows": (dict(batches=[{"input_ids": torch.zeros(0, 7).long()}]), BadData, "batch 1 is empty; leave it out"),
    "no inputs": (dict(batches=[{}]), BadData, "batch 1 is empty; leave it out"),
    "padding": (dict(masked=True), BadData, "no calibration batch reached .*q_proj"),
    "tuple": (dict(batches=[(1,)]), BadData, "batch 1 is a tuple"),
    "unlabelled": (dict(needs=("errors",)), BadData, "LlamaForCausalLM gives no loss"),
    "infinite loss": (dict(needs=("gradient",), loss=_endless), BadData, "batch 1 gives the loss (nan|inf|-inf)"),
    "vector loss": (dict(needs=("gradient",), loss=_vector), BadData, r"has \(3,\) values"),
    "constant loss": (dict(needs=("gradient",), loss=_constant), BadData, "depends on none"),
    "no loss": (dict(needs=("gradient",), loss=lambda *_: None), BadData, "loss of calibration batch 1 is a NoneType"),
    "None": (dict(batches=None), BadData, "batches are a NoneType, not an iterable of mappings"),
    "word": (dict(needs=("input",)), UnknownName, "cannot gather 'input'; did you mean inputs"),
    "embedding": (dict(targets=["embed"]), BadMethod, "embed_tokens is a Embedding; leave it out"),
    "no site": (dict(targets=[]), BadMethod, "no site to calibrate"),
    "mask": (dict(mask=torch.ones(3, 1, 7, 7)), BadData, "attention_mask of batch 1 has to be a tensor"),
}


@pytest.mark.parametrize("case", MISUSES)
def test_misuse_is_a_sentence(case: str) -> None:
    changes, kind, words = MISUSES[case]
    model, options = tiny("llama"), dict(changes)
    sites = resolve(model, options.pop("targets", ["attn.q"]))
    batch = {"input_ids": tokens(model)}
    if options.pop("masked", False):
        batch["attention_mask"] = torch.zeros(3, 7).long()
    if "mask" in options:
        batch["attention_mask"] = options.pop("mask")
    with pytest.raises(kind, match=words):
        calibrate(model, sites, options.pop("batches", [batch]), **options)


def test_a_text_names_one_need_or_several() -> None:
    model = tiny("llama")
    (site,) = resolve(model, ["layers.0.self_attn.q_proj"])
    one, both = (calibrate(model, [site], [data(model)], needs=n)[site.path, None] for n in ("norms", "norms, inputs"))
    assert one.norm_in == both.norm_in is not None
    assert one.inputs is None and both.inputs is not None


def test_gradients_are_refused_where_there_can_be_none() -> None:
    model = tiny("llama")
    before, sites = snapshot(model), resolve(model, ["attn.q"])
    with torch.inference_mode():
        assert calibrate(model, sites, [data(model)])
        with pytest.raises(BadState, match=r"torch.inference_mode allows no gradients.*outside"):
            calibrate(model, sites, [data(model)], needs=("gradient",))
    assert snapshot(model) == before


def test_what_lengthens_the_sequence_is_refused() -> None:
    """Inserted places are no data, and no mask of a batch tells where they are."""
    model = tiny("llama")
    sites = resolve(model, ["attn.q"])
    plain = calibrate(model, sites, [data(model)])
    lk.attach(model, lk.PrefixEmbedding(prefix=2, infix=1), name="p")
    with pytest.raises(BadState, match=r"'p' is in force, which puts places of its own.*use\(model, None\)"):
        calibrate(model, sites, [data(model)])
    with lk.use(model, None):
        found = calibrate(model, sites, [data(model)])
    assert [each.tokens for each in found.values()] == [each.tokens for each in plain.values()]


class Routed(nn.Module):
    """Sends half of the positions through an expert, and gives it as a loss on request."""

    def __init__(self) -> None:
        super().__init__()
        self.expert, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        self.idle(x)
        return self.expert(x.flatten(0, 1)[::2]).sum()


def test_shapes_that_hide_the_padding_are_refused_only_where_there_is_some() -> None:
    model, x = Routed(), torch.randn(2, 4, 3)
    expert, idle = (Site(path, "other", None, layout_of(model.get_submodule(path))) for path in ("expert", "idle"))
    mask = torch.ones(2, 4).long()
    assert calibrate(model, [expert], [{"x": x, "attention_mask": mask}])["expert", None].tokens == 4
    mask[0, 0] = 0
    with pytest.raises(BadData, match=r"expert sees \(4,\) positions.*\(2, 4\)"):
        calibrate(model, [expert], [{"x": x, "attention_mask": mask}])
    batches, loss = [{"x": x, "attention_mask": mask}], lambda model, batch: model(**batch)
    with pytest.raises(BadData, match="the loss does not depend on idle"):
        calibrate(
            model, [idle, expert], [{**batches[0], "attention_mask": mask * 0 + 1}], needs=("gradient",), loss=loss
        )


def test_half_precision_is_gathered_in_float32() -> None:
    model = tiny("llama", torch.bfloat16)
    sites = resolve(model, ["attn.q", "mlp.down"])
    for found in calibrate(model, sites, [data(model)], needs=NEEDS).values():
        assert isinstance(found, SiteStatistics) and found.inputs is not None and found.gradient_OI is not None
        assert found.inputs.covariance_DD.dtype == found.gradient_OI.dtype == torch.float32

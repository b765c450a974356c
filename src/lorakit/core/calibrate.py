"""Gather statistics of a model's layers from a data set, in one pass and in memory that does not grow with the data.

Legend: N counted positions of one batch, I in, O out.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any, final

import torch
from torch import Tensor, nn

from lorakit.core.insertion import inserts_of
from lorakit.core.layouts import LinearLayout
from lorakit.core.method import split
from lorakit.core.mode import mode
from lorakit.core.positions import Positions, positions_of
from lorakit.core.sites import Site
from lorakit.core.state import state_or_new
from lorakit.core.statistics import FOLDS, NEEDS, Moment, Running, SiteStatistics, Statistics, merged
from lorakit.errors import BadData, BadMethod, BadState, UnknownName, nearest

Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]


def calibrate(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Mapping[str, Any]],
    *,
    needs: Collection[str] | str = ("inputs",),
    loss: Loss | None = None,
    labelled_only: bool = False,
    share: bool = True,
) -> Statistics:
    """Run the model over `batches` once and return what its `sites` saw, by path and slice.

    Padding (`attention_mask` 0) never counts, except in gradients, which are the loss's own. The model runs in
    evaluation mode with whatever adapters are in force, and is afterwards as it was, also after an error. Memory: one
    (width, width) matrix for each moment and one (out, in) for each gradient, on the layer's device.

    Args:
        model: any model whose forward takes the entries of a batch as keywords.
        sites: Linear or Conv1D layers, or slices of them.
        batches: mappings of forward's keywords to tensors; any iterable, read once.
        needs: what to gather: inputs, outputs, errors, folds, gradient, norms (fields of `SiteStatistics`); names, or
            a text of them with commas.
        loss: `loss(model, batch)` runs the forward and gives the loss; by default `model(**batch).loss`.
        labelled_only: count only positions that have a label.
        share: gather once for layers that see the same tensor (q, k, v).

    Raises:
        BadMethod: a site without a weight matrix of a linear layer.
        BadState: an adapter is in force that makes sequences longer, or gradients are wanted in `inference_mode`.
        BadData: no data, NaN or infinity (names batch and layer), a batch without a loss, a layer that saw nothing.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from lorakit.core.sites import resolve
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=10))
        >>> statistics = calibrate(model, resolve(model, ["attn.q"]), [{"input_ids": torch.ones(2, 3).long()}])
        >>> [(path, found.tokens, found.inputs.covariance_DD.shape) for (path, _), found in statistics.items()]
        [('transformer.h.0.attn.c_attn', 6, torch.Size([8, 8]))]
    """
    wanted = frozenset(split(needs) if isinstance(needs, str) else needs)
    unknown = sorted(wanted - set(NEEDS))
    if unknown:
        raise UnknownName(f"calibration cannot gather {unknown[0]!r}; {nearest(unknown[0], NEEDS)}")
    gatherer = _Gatherer(model, sites, wanted, share)
    _check_state(model, graded=gatherer.graded)
    with ExitStack() as held:
        held.enter_context(mode(model, training=False))
        held.enter_context(_frozen(model))
        held.enter_context(gatherer.listening(model))
        _pass(gatherer, model, batches, loss, labelled_only=labelled_only)
    return gatherer.statistics()


def _pass(
    gatherer: _Gatherer, model: nn.Module, batches: Iterable[Any], loss: Loss | None, *, labelled_only: bool
) -> None:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    two_sided = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    before = 0
    for number, given in enumerate(_each(batches), 1):
        if not isinstance(given, Mapping):
            raise BadData(f"batch {number} is a {type(given).__name__}, not a mapping of forward's keywords")
        if not any(value.numel() if isinstance(value, Tensor) else True for value in given.values()):
            raise BadData(f"batch {number} is empty; leave it out")
        batch = {key: value.detach().to(device) if isinstance(value, Tensor) else value for key, value in given.items()}
        positions = positions_of(batch, number, before, labelled_only=labelled_only, two_sided=two_sided)
        gatherer.take(model, batch, positions, loss)
        before += positions.rows


def _each(batches: Iterable[Any]) -> Iterator[Any]:
    try:
        return iter(batches)
    except TypeError:
        raise BadData(f"the batches are a {type(batches).__name__}, not an iterable of mappings") from None


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient, so that a backward pass leaves nothing on them."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


@final
class _Inputs:
    """What layers that see one and the same tensor share; the first of them, `leader`, gathers it."""

    def __init__(self, leader: str, needs: frozenset[str]) -> None:
        self.leader, self.needs = leader, needs
        self.parts = [Running() for _ in range(FOLDS if "folds" in needs else 1)]
        self.tokens, self.norms = 0, 0.0
        self._latest: Callable[[], Tensor | None] = lambda: None

    def sees(self, x: Tensor) -> bool:
        """Whether `x` is the tensor that was gathered last (held weakly: no activation outlives its forward)."""
        return self._latest() is x

    def add(self, x: Tensor, x_NI: Tensor, folds_N: Tensor) -> None:
        self._latest = weakref.ref(x)
        self.tokens += len(x_NI)
        if "folds" in self.needs:
            for number, part in enumerate(self.parts):
                part.add(x_NI[folds_N == number])
        elif "inputs" in self.needs:
            self.parts[0].add(x_NI)
        if "norms" in self.needs:
            self.norms += float(x_NI.norm(dim=1).sum())

    @cached_property
    def moments(self) -> tuple[Moment | None, tuple[Moment, ...]]:
        """All inputs together, and in parts; made once, when everything has been seen."""
        if not self.needs & {"inputs", "folds"}:
            return None, ()
        parts = tuple(part.moment() for part in self.parts)
        return (merged(parts), parts) if "folds" in self.needs else (parts[0], ())


@final
class _Outputs:
    """What is gathered behind one site: its outputs, and gradients there."""

    def __init__(self, site: Site) -> None:
        self.site, self.outputs, self.errors = site, Running(), Running()
        self.gradient_OI, self.norms, self.felt = torch.empty(0), 0.0, False

    def take(self, whole: Tensor) -> Tensor:
        """The site's own units of a layer's output."""
        return whole if self.site.slice is None else self.site.slice.take(whole)

    def add_gradient(self, gradient_OI: Tensor) -> None:
        self.gradient_OI = self.gradient_OI + gradient_OI if self.gradient_OI.numel() else gradient_OI


@final
class _Gatherer:
    """The hooks of one calibration and what they have gathered."""

    def __init__(self, model: nn.Module, sites: Sequence[Site], needs: frozenset[str], share: bool) -> None:
        _check(model, sites)
        self.needs, self.share, self.batches = needs, share, 0
        self.graded = bool(needs & {"gradient", "errors"})
        self.sites: dict[str, list[_Outputs]] = {}
        for site in dict.fromkeys(sites):
            self.sites.setdefault(site.path, []).append(_Outputs(site))
        self.inputs: dict[str, _Inputs] = {}
        self.tokens = dict.fromkeys(self.sites, 0)
        self.positions: Positions | None = None  # of the batch that runs now; other forwards are not listened to

    @contextmanager
    def listening(self, model: nn.Module) -> Iterator[None]:
        with ExitStack() as held:
            for path in self.sites:
                heard = partial(self._heard, path)
                held.enter_context(model.get_submodule(path).register_forward_hook(heard, with_kwargs=True))
            yield

    def take(self, model: nn.Module, batch: Mapping[str, Any], positions: Positions, loss: Loss | None) -> None:
        """Run one batch, forward and (for gradients) backward."""
        self.positions, self.batches = positions, self.batches + 1
        try:
            with torch.set_grad_enabled(self.graded):
                if self.graded:
                    _checked(positions.number, (loss or _loss)(model, batch)).backward()
                elif loss is None:
                    model(**batch)
                else:
                    loss(model, batch)
        finally:
            self.positions = None

    def _heard(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Any:
        if self.positions is None:
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        kept_N = self.positions.kept(x, path)
        self.tokens[path] += self._add_inputs(path, x, kept_N)
        if self.needs & {"outputs", "norms"}:
            self._add_outputs(path, module, _flat(y, kept_N))
        return self._watched(path, x, y, kept_N) if torch.is_grad_enabled() else None

    def _add_inputs(self, path: str, x: Tensor, kept_N: Tensor | None) -> int:
        if path not in self.inputs:
            others = (each for each in self.inputs.values() if self.share and each.sees(x))
            self.inputs[path] = next(others, None) or _Inputs(path, self.needs)
        inputs = self.inputs[path]
        if inputs.leader == path:
            assert self.positions is not None
            x_NI, folds_N = _flat(x, kept_N), self.positions.folds(x)
            self._refuse_strange(path, x_NI)
            inputs.add(x, x_NI, folds_N if kept_N is None else folds_N[kept_N])
        elif not inputs.sees(x):
            raise _no_longer_shared(path, inputs.leader)
        return x[..., 0].numel() if kept_N is None else int(kept_N.sum())

    def _add_outputs(self, path: str, module: nn.Module, y_NO: Tensor) -> None:
        self._refuse_strange(path, y_NO)
        bias = module._parameters.get("bias")
        for each in self.sites[path]:
            if "outputs" in self.needs:
                each.outputs.add(each.take(y_NO))
            if "norms" in self.needs:
                each.norms += float(each.take(y_NO if bias is None else y_NO - bias.float()).norm(dim=1).sum())

    def _watched(self, path: str, x: Tensor, y: Tensor, kept_N: Tensor | None) -> Tensor:
        """The same output, on a graph that begins here if none has begun, and that reports its gradient."""
        watched = y if y.requires_grad else y.detach().requires_grad_().clone()  # a clone may be written in place
        watched.register_hook(partial(self._felt, path, x.detach(), kept_N))
        return watched

    def _felt(self, path: str, x: Tensor, kept_N: Tensor | None, gradient: Tensor) -> None:
        delta_NO, x_NI = _flat(gradient, None), _flat(x, None)
        self._refuse_strange(path, delta_NO)
        for each in self.sites[path]:
            own_NO, each.felt = each.take(delta_NO), True
            if "gradient" in self.needs:
                each.add_gradient(own_NO.T @ x_NI)
            if "errors" in self.needs:
                each.errors.add(own_NO if kept_N is None else own_NO[kept_N])

    def _refuse_strange(self, path: str, numbers: Tensor) -> None:
        if not bool(numbers.isfinite().all()):
            raise BadData(
                f"calibration batch {self.batches} gives NaN or infinity at {path}; take it out (nothing was averaged)"
            )

    def statistics(self) -> Statistics:
        """What was gathered, as plain numbers on the CPU."""
        if not self.batches:
            raise BadData("there is no calibration batch; give at least one")
        unseen = [path for path, tokens in self.tokens.items() if not tokens]
        if unseen:
            raise BadData(f"no calibration batch reached {', '.join(unseen[:5])}; leave it out, or give other data")
        outputs = [each for found in self.sites.values() for each in found]
        unfelt = [each.site.path for each in outputs if not each.felt]
        if self.graded and unfelt:
            raise BadData(f"the loss does not depend on {', '.join(unfelt[:5])}; leave it out, or take another loss")
        return {(each.site.path, each.site.slice): self._of_site(each) for each in outputs}

    def _of_site(self, each: _Outputs) -> SiteStatistics:
        path, tokens = each.site.path, self.tokens[each.site.path]
        inputs = self.inputs[path]
        if inputs.tokens != tokens:
            raise _no_longer_shared(path, inputs.leader)
        whole, folds = inputs.moments
        assert each.site.layout is not None
        normed, gradient_OI = "norms" in self.needs, each.gradient_OI
        return SiteStatistics(
            shape=(each.site.out_features, each.site.layout.in_features),
            tokens=tokens,
            inputs=whole,
            outputs=each.outputs.moment() if "outputs" in self.needs else None,
            errors=each.errors.moment() if "errors" in self.needs else None,
            folds=folds,
            gradient_OI=(gradient_OI / self.batches).cpu() if "gradient" in self.needs else None,
            norm_in=inputs.norms / tokens if normed else None,
            norm_out=each.norms / tokens if normed else None,
        )


def _flat(x: Tensor, kept_N: Tensor | None) -> Tensor:
    """The counted positions as rows, in float32."""
    flat_ND = x.detach().reshape(-1, x.shape[-1])
    return (flat_ND if kept_N is None else flat_ND[kept_N]).float()


def _check(model: nn.Module, sites: Sequence[Site]) -> None:
    if not sites:
        raise BadMethod("there is no site to calibrate; give at least one")
    for site in sites:
        if not isinstance(site.layout, LinearLayout):
            kind = type(model.get_submodule(site.path)).__name__
            raise BadMethod(f"calibration needs Linear or Conv1D layers, but {site.path} is a {kind}; leave it out")


def _check_state(model: nn.Module, *, graded: bool) -> None:
    state = state_or_new(model)
    if any(inserts_of(state)) and state.routing is not None:
        name = state.routing.names[0]
        raise BadState(f"{name!r} is in force, which puts places of its own into every sequence, and they are no data; "
                       "calibrate in `with use(model, None):`")  # fmt: skip
    if graded and torch.is_inference_mode_enabled():
        raise BadState("torch.inference_mode allows no gradients; gather them outside of it")


def _loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    found: Tensor | None = getattr(model(**batch), "loss", None)
    if found is None:
        raise BadData(f"{type(model).__name__} gives no loss for these batches; add labels to them, or pass a loss")
    return found


def _checked(number: int, loss: object) -> Tensor:
    if not isinstance(loss, Tensor):
        kind = type(loss).__name__
        raise BadData(f"the loss of calibration batch {number} is a {kind}; it has to be a tensor of one number")
    if loss.numel() != 1:
        raise BadData(f"the loss of calibration batch {number} has {tuple(loss.shape)} values; it has to be one number")
    if not bool(loss.isfinite()):
        raise BadData(f"calibration batch {number} gives the loss {loss.item()}; take it out (nothing was averaged)")
    if not loss.requires_grad:
        raise BadData(f"the loss of calibration batch {number} depends on none of the layers to calibrate")
    return loss


def _no_longer_shared(path: str, leader: str) -> BadData:
    return BadData(
        f"{path} saw the tensors that {leader} saw in some calls and others in others; calibrate with share=False"
    )

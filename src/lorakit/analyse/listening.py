"""Listen to a model that runs on the base and then on an adapter, and sum up what differs, layer by layer.

Legend: B batch, T tokens, N counted positions, O output units, H heads, D units of a hidden state.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from lorakit.core.layouts import Conv2dLayout, layout_of
from lorakit.core.positions import Positions
from lorakit.core.routing import use
from lorakit.core.sites import Slice, sites_of
from lorakit.core.state import adapters_of
from lorakit.errors import BadData

BASE: Final = None
NOTHING: Final = torch.zeros(0, dtype=torch.float64)


@final
class Sums:
    """Sums of squares over positions, by unit, of what is and of what is added to it."""

    def __init__(self) -> None:
        self.added_O, self.base_O, self.positions = NOTHING, NOTHING, 0

    def add(self, added_NO: Tensor, base_NO: Tensor) -> None:
        """Count more positions."""
        added_O, base_O = (each.float().square().sum(0).double().cpu() for each in (added_NO, base_NO))
        self.added_O = self.added_O + added_O if self.positions else added_O
        self.base_O = self.base_O + base_O if self.positions else base_O
        self.positions += len(added_NO)

    def ratio(self, path: str) -> float:
        """‖added‖ / ‖base‖; 0 where nothing is added, infinite where something is added to zeros alone.

        Raises:
            BadData: the sums are not finite.
        """
        added, base = self.added_O.sum(), self.base_O.sum()
        if not math.isfinite(added + base):
            raise BadData(f"the data give NaN or infinity at {path}; take out the batch that does")
        return float(_ratio(added, base))

    def by_head(self, heads: int) -> Tensor:
        """The ratio (H,) of each of the heads that share the units out; none where they do not."""
        if not heads or len(self.added_O) % heads:
            return NOTHING.float()
        return _ratio(*(each.view(heads, -1).sum(1) for each in (self.added_O, self.base_O))).float()

    def of(self, part: Slice | None) -> Sums:
        """The sums of a slice's units."""
        if part is None:
            return self
        found = Sums()
        found.added_O, found.base_O = part.take(self.added_O), part.take(self.base_O)
        return found


def _ratio(added: Tensor, base: Tensor) -> Tensor:
    return torch.where(added > 0, added / base, added).sqrt()


@final
class Listener:
    """The hooks of one comparison, and what they have summed up by module path."""

    def __init__(self, model: nn.Module, name: str) -> None:
        sites = sites_of(model)
        self.model, self.name = model, name
        adapted = {path: module for path, module, adapters in adapters_of(model) if adapters.deltas(name)}
        self.local = {path: Sums() for path in adapted}
        self.blocks = {site.path: Sums() for site in sites if site.role == "block"}
        self.heads = {site.path: Sums() for site in sites if site.role == "attn.o" and site.layout}
        self.drift_N = NOTHING  # of each position of the batch after the last block
        self._weights = {path: _weights(module) for path, module in adapted.items()}
        self._positions: Positions | None = None  # of the batch that runs now; other forwards are not listened to
        self._adapted = False  # whether it runs on the adapter
        self._inputs: dict[str, Any] = {}
        self._base: dict[str, deque[Tensor]] = defaultdict(deque)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hang the hooks onto the model; those of an adapter have run before ours see an output."""
        hooks = []
        for path in self.local:
            module = self.model.get_submodule(path)
            hooks.append(module.register_forward_pre_hook(partial(self._enters, path), prepend=True, with_kwargs=True))
            hooks.append(module.register_forward_hook(partial(self._leaves, path)))
        for path, sums in self.blocks.items():
            hooks.append(self.model.get_submodule(path).register_forward_hook(partial(self._gives, path, sums)))
        for path, sums in self.heads.items():
            module, taking = self.model.get_submodule(path), partial(self._takes, path, sums)
            hooks.append(module.register_forward_pre_hook(taking, prepend=True, with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def run(self, batch: dict[str, Any], positions: Positions) -> list[Any]:
        """What the model makes of a batch on the base, and on the adapter."""
        outputs = []
        try:
            for what in (BASE, self.name):
                self._positions, self._adapted = positions, what is not BASE
                with use(self.model, what):
                    outputs.append(self.model(**batch))
        finally:
            self._positions = None
            self._base.clear()
        return outputs

    def _enters(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._positions is not None and self._adapted:
            self._inputs[path] = args, kwargs

    def _leaves(self, path: str, module: nn.Module, _: Any, output: Any) -> None:
        positions = self._positions
        if positions is None or not self._adapted:
            return
        (args, kwargs), rows = self._inputs.pop(path), _rows(module, output)
        if not isinstance(rows, Tensor) or _weights(module) != self._weights[path]:
            return  # a whole stack's outputs; or weights that are replaced from further up, so that there is no base
        self._positions = None  # nothing below is listened to while the layer runs again
        with use(self.model, BASE):
            base = _rows(module, module.forward(*args, **kwargs))
        self._positions = positions
        self.local[path].add(*(_counted(each, path, positions) for each in (rows - base, base)))

    def _gives(self, path: str, sums: Sums, module: nn.Module, _: Any, output: Any) -> None:
        self._hears(path, sums, _rows(module, output))

    def _takes(self, path: str, sums: Sums, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._hears(path, sums, args[0] if args else next(iter(kwargs.values())))

    def _hears(self, path: str, sums: Sums, hidden: Tensor) -> None:
        if self._positions is None:
            return
        if not self._adapted:
            self._base[path].append(hidden.clone())  # what follows may write into it
            return
        base = self._base[path].popleft()
        sums.add(*(_counted(each, path, self._positions) for each in (hidden - base, base)))
        if path == list(self.blocks)[-1]:
            self.drift_N = _ratio(*(each.float().square().sum(-1).flatten() for each in (hidden - base, base)))


def _weights(module: nn.Module) -> list[int]:
    """Which parameters a module runs with."""
    return [id(parameter) for parameter in module.parameters()]


def _rows(module: nn.Module, output: Any) -> Tensor:
    """A module's output with its units last."""
    y = output[0] if isinstance(output, tuple) else output
    return y.movedim(1, -1) if isinstance(layout_of(module), Conv2dLayout) else y


def _counted(x: Tensor, path: str, positions: Positions) -> Tensor:
    kept_N = positions.kept(x, path)
    flat_ND = x.reshape(-1, x.shape[-1])
    return flat_ND if kept_N is None else flat_ND[kept_N]

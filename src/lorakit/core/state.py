"""What is attached to a model, kept on the model object itself: no globals, no thread-locals.

The root module holds one `State`; every adapted module holds an `Adapters` child that points to it, so that
`copy.deepcopy` and `pickle` carry both along.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from lorakit.core.delta import Delta
from lorakit.core.plan import Plan
from lorakit.core.recompute import Recomputation
from lorakit.core.route import Routing, key_of
from lorakit.core.sites import ADAPTERS
from lorakit.errors import BadState, NoSuchAdapter, nearest

if TYPE_CHECKING:
    from lorakit.core.method import Method
    from lorakit.core.stack import Reading

_ATTRIBUTE = "_lorakit"


@dataclass
class Attached:
    """One attached adapter: the method that made it and the plan it was resolved to."""

    method: Method
    plan: Plan
    trainable: bool


@dataclass
class State:
    """Everything that lorakit knows about one model."""

    attached: dict[str, Attached] = field(default_factory=dict)
    routing: Routing | None = None
    required_grad: dict[str, bool] = field(default_factory=dict)  # the base's flags before the first attach
    originals: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)  # what merging changed, and what it was
    merged: str = ""  # what is merged, in words
    attributes: dict[str, Any] = field(default_factory=dict)  # the model's own, where ours stand in for them
    repeats: int = 1  # how often `generate` repeats each row, while it runs
    owner: int | None = None  # the thread whose `with use(...)` is open
    busy: dict[int, int] = field(default_factory=dict)  # module (its id) in which something stands in -> its thread
    recomputation: Recomputation = field(default_factory=Recomputation)
    context_ends_B: Tensor | None = None  # where the contexts of the present batch end, if a caller or labels told
    labels_told: bool = False
    reading: Reading | None = None  # how the stack reads, where a method puts something into its sequence
    within: Routing | None = None  # the routing with what was put in, while the stack runs

    def original(self, parameter: nn.Parameter) -> Tensor:
        """The base's value of a parameter, also while something is merged into it."""
        return next((value for changed, value in self.originals if changed is parameter), parameter)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is in nobody's block and awaits no backward."""
        return self.__dict__ | {
            **{"owner": None, "busy": {}, "recomputation": Recomputation(), "within": None},
            **{"context_ends_B": None, "labels_told": False, "repeats": 1},
        }


class Adapters(nn.Module):
    """The child of an adapted module that holds its deltas: adapter -> slot -> delta."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.state = state
        self.acted: set[str] = set()  # names; a compiled forward marks nothing
        self.versions: dict[str, int] = {}  # of each adapter's parameters when they were put here

    def deltas(self, name: str) -> list[Delta]:
        """The deltas of one adapter here, in order; none if it does not touch this module."""
        return self.at(key_of(name))

    def at(self, key: str) -> list[Delta]:
        """`deltas`, by the name's encoded form."""
        slots = self._modules.get(key)
        return [] if slots is None else cast(list[Delta], list(slots._modules.values()))

    def turns(self, keys: tuple[str, ...]) -> list[list[Delta | None]]:
        """Which deltas act here one after another, each time those of all adapters in the order of `keys`.

        A slot that several adapters use is one turn, unless they have their slots in different orders: then each
        adapter has turns of its own.
        """
        children = [self._modules.get(key) for key in keys]
        own = [[] if child is None else list(child._modules) for child in children]
        slots = list(dict.fromkeys(slot for each in own for slot in each))
        if all(each == [slot for slot in slots if slot in each] for each in own):
            turns = [(slot, range(len(keys))) for slot in slots]
        else:
            turns = [(slot, range(number, number + 1)) for number, each in enumerate(own) for slot in each]
        found = [[c._modules.get(slot) if c is not None and n in who else None for n, c in enumerate(children)]
                 for slot, who in turns]  # fmt: skip
        return cast(list[list[Delta | None]], found)

    def add(self, name: str, delta: Delta) -> None:
        """Put a delta into its slot."""
        key = key_of(name)
        if key not in self._modules:
            self.add_module(key, nn.ModuleDict())
        cast(nn.ModuleDict, self._modules[key])[delta.placement.slot] = delta
        self.versions[name] = _version(self.deltas(name))

    def rests(self, name: str) -> bool:
        """Whether an adapter has deltas here that no forward used: not seen to act, no gradient, never stepped."""
        deltas = [delta for delta in self.deltas(name) if not delta.may_rest]
        graded = any(parameter.grad is not None for delta in deltas for parameter in delta.parameters())
        stepped = _version(deltas) > self.versions.get(name, 0)  # a copy begins at 0 again
        return bool(deltas) and name not in self.acted and not graded and not stepped

    def remove(self, name: str) -> None:
        """Drop all deltas of one adapter."""
        self._modules.pop(key_of(name), None)
        self.acted.discard(name)
        self.versions.pop(name, None)


def _version(deltas: list[Delta]) -> int:
    """A number that grows with every change in place, such as an optimiser's step."""
    return sum(parameter._version for delta in deltas for parameter in delta.parameters())


def state_of(model: nn.Module) -> State:
    """The model's state.

    Raises:
        BadState: nothing is attached to this model object.
    """
    state = model.__dict__.get(_ATTRIBUTE)
    if state is None:
        kind = type(model).__name__
        raise BadState(f"no adapter is attached to this {kind}; attach or load one first")
    return cast(State, state)


def state_or_new(model: nn.Module) -> State:
    """The model's state, or a fresh one that is not yet on the model."""
    return cast(State, model.__dict__.get(_ATTRIBUTE) or State())


def set_state(model: nn.Module, state: State | None) -> None:
    """Put the state on the model, or take it off."""
    if state is None:
        model.__dict__.pop(_ATTRIBUTE, None)
    else:
        model.__dict__[_ATTRIBUTE] = state


def attached_to(model: nn.Module, name: str) -> Attached:
    """The record of one adapter.

    Raises:
        NoSuchAdapter: no adapter of that name; the message gives the names there are.
    """
    state = state_of(model)
    if name not in state.attached:
        raise NoSuchAdapter(f"no adapter is called {name!r}; {nearest(name, state.attached)}")
    return state.attached[name]


def adapters_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, Adapters]]:
    """Every adapted module: its path, itself, and what is attached to it."""
    for path, module in model.named_modules():
        child = module._modules.get(ADAPTERS)
        if isinstance(child, Adapters):
            yield path, module, child


def deltas_of(model: nn.Module, name: str) -> list[Delta]:
    """All deltas of one adapter, in the order of its plan."""
    plan = attached_to(model, name).plan
    order = {(placement.path, placement.slot): number for number, placement in enumerate(plan)}
    found = [delta for _, _, adapters in adapters_of(model) for delta in adapters.deltas(name)]
    return sorted(found, key=lambda delta: order[delta.placement.path, delta.placement.slot])


def own_deltas_of(model: nn.Module, name: str) -> list[Delta]:
    """The deltas of one adapter that are its method's own: not those of modules and biases trained whole."""
    return [delta for delta in deltas_of(model, name) if not delta.placement.is_replaced]


def adapter_tensors(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The adapter's own parameters by `<module path>.<slot>.<parameter>`, in the order of its plan (live tensors)."""
    return cast(dict[str, nn.Parameter], _distinct(model, name, nn.Module.named_parameters))


def adapter_buffers(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The adapter's other numbers (masks, averages) by the same names (live tensors)."""
    return _distinct(model, name, nn.Module.named_buffers)


def _distinct(
    model: nn.Module, name: str, listed: Callable[[nn.Module], Iterator[tuple[str, Tensor]]]
) -> dict[str, Tensor]:
    """Tensors of an adapter; what its deltas share stands once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for delta in deltas_of(model, name):
        for key, value in listed(delta):
            found.setdefault(id(value), (f"{delta.placement.path}.{delta.placement.slot}.{key}", value))
    return dict(found.values())


def idle(model: nn.Module, name: str) -> list[str]:
    """Paths of the modules whose delta of this adapter has not acted since it was attached."""
    attached_to(model, name)
    return [path for path, _, adapters in adapters_of(model) if adapters.rests(name)]


def require_unmerged(state: State, verb: str) -> None:
    """Refuse `verb` while an adapter is merged."""
    if state.merged:
        raise BadState(f"{verb} is not possible while {state.merged} is merged; call unmerge(model) first")


def is_claimed(state: State) -> bool:
    """Whether another thread has a `with use(...)` open, or was the first to put something into a module."""
    if state.owner is not None and state.owner != threading.get_ident():
        return True
    return bool(state.busy) and not _is_first(state)


def _is_first(state: State) -> bool:
    """Whether no other thread came before this one; threads that are gone do not count."""
    me = threading.get_ident()
    if next(iter(list(state.busy.values())), me) == me:
        return True
    alive = {me, *(thread.ident for thread in threading.enumerate())}
    for module, thread in list(state.busy.items()):
        if thread not in alive:
            state.busy.pop(module, None)
    return next(iter(list(state.busy.values())), me) == me


def claim(state: State, *, recomputing: bool = False) -> None:
    """Refuse a second thread while another has the model in use (backward has threads of its own).

    Raises:
        BadState: a `with use(...)` of another thread is open, or its forward has put something into the model.
    """
    if is_claimed(state) and not recomputing:
        raise BadState("another thread has this model in use, in a `with use(...)` block or in a forward that changes "
                       "weights or lengthens the sequence; give each thread a model of its own")  # fmt: skip


def hold(state: State, module: nn.Module, *, recomputing: bool = False) -> None:
    """Let no other thread run the model until `free`, since this one puts something into a module; the first wins.

    Raises:
        BadState: another thread has the model in use.
    """
    state.busy.setdefault(id(module), threading.get_ident())
    try:
        claim(state, recomputing=recomputing)
    except BadState:
        if not is_held(state, module):
            free(state, module)
        raise
    state.busy.setdefault(id(module), threading.get_ident())  # again, after one that is gone


def is_held(state: State, module: nn.Module) -> bool:
    """Whether another thread has put something into this module."""
    return state.busy.get(id(module), threading.get_ident()) != threading.get_ident() and not _is_first(state)


def free(state: State, module: nn.Module) -> None:
    """End `hold`."""
    state.busy.pop(id(module), None)

"""What is attached to a model, as numbers and as a table."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lorakit.core.delta import Delta
from lorakit.core.experts import shape_of
from lorakit.core.plan import Placement
from lorakit.core.quantised import base_size
from lorakit.core.sites import ADAPTERS
from lorakit.core.state import attached_to, deltas_of, idle, own_deltas_of, state_of

FLOAT = 4  # bytes of a float32 master
ADAM = 2 * FLOAT  # bytes of AdamW's two moments


@dataclass(frozen=True)
class AdapterSummary:
    """One adapter: its parameters, where they are, and what they cost."""

    name: str
    method: str
    rows: tuple[tuple[str, int, str, str, int], ...]  # role or kind, sites, shape, rank and scale, parameters
    parameters: int
    stored: int  # numbers in the saved file (slices of one fused layer are written as a block)
    trainable: int
    resting: tuple[str, ...]  # layers whose delta has not acted since attaching

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of the tensors in the saved file (float32), header not counted."""
        return self.stored * FLOAT

    @property
    def bytes_in_optimiser(self) -> int:
        """Bytes of AdamW's moments for what is trained."""
        return self.trainable * ADAM


@dataclass(frozen=True)
class Summary:
    """A model's adapters; `print` it to see the table."""

    model: str
    base_parameters: int
    base_bytes: int
    adapters: tuple[AdapterSummary, ...]
    in_force: str

    @property
    def trainable_parameters(self) -> int:
        """Numbers that training changes, of all adapters together."""
        return sum(adapter.trainable for adapter in self.adapters)

    @property
    def trainable_share(self) -> float:
        """Trained numbers for each number of the base."""
        return self.trainable_parameters / max(self.base_parameters, 1)

    def __str__(self) -> str:
        base = f"{self.base_parameters:,} frozen parameters ({size(self.base_bytes)})"
        head = f"{self.model}: {base}; in force: {self.in_force}"
        return "\n".join([head, *(_told(adapter, self.base_parameters) for adapter in self.adapters)])


def summary(model: nn.Module) -> Summary:
    """Sites, shapes, trainable share, bytes on disk and in the optimiser, and deltas that have not acted.

    Raises:
        BadState: nothing is attached.

    Example:
        >>> import lorakit as lk
        >>> from transformers import GPT2Config, GPT2Model
        >>> model = GPT2Model(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=10, n_positions=16))
        >>> lk.attach(model, lk.LoRA(rank=2), name="a")
        >>> lk.summary(model).trainable_parameters
        128
    """
    state = state_of(model)
    base = {path: p for path, p in model.named_parameters() if ADAPTERS not in path.split(".")}
    parameters, bytes_ = base_size(model, base)
    routing = state.routing
    in_force = state.merged + " (merged)" if state.merged else ", ".join(routing.used) if routing else "the base"
    return Summary(
        model=type(model).__name__,
        base_parameters=parameters,
        base_bytes=bytes_,
        adapters=tuple(_adapter(model, name) for name in state.attached),
        in_force=in_force,
    )


def _adapter(model: nn.Module, name: str) -> AdapterSummary:
    record, deltas = attached_to(model, name), deltas_of(model, name)
    groups: dict[tuple[str, str, str], list[int]] = {}
    seen: dict[int, nn.Parameter] = {}
    for delta in deltas:
        module = model.get_submodule(delta.placement.path)
        key = (delta.placement.role, _shape(model, delta.placement), _size(delta, module))
        new = {id(p): p for p in delta.parameters() if id(p) not in seen}  # what several deltas hold counts once
        groups.setdefault(key, []).append(sum(p.numel() for p in new.values()))
        seen |= new
    own = list(seen.values())
    whole = [p for delta in deltas if delta.placement.is_replaced for p in delta.parameters()]
    stored = [*record.method.to_peft(own_deltas_of(model, name))[1].values(), *whole]
    return AdapterSummary(
        name=name,
        method=record.method.name,
        rows=tuple((role, len(counts), shape, rank, sum(counts)) for (role, shape, rank), counts in groups.items()),
        parameters=sum(p.numel() for p in own),
        stored=sum(tensor.numel() for tensor in stored),
        trainable=sum(p.numel() for p in own if p.requires_grad),
        resting=tuple(idle(model, name)),
    )


def _shape(model: nn.Module, placement: Placement) -> str:
    shape = shape_of(model.get_submodule(placement.path), placement.parameter)
    if shape is None or not placement.rank:
        return ""
    *experts, out, inner = shape
    return " x ".join(str(size) for size in (*experts, placement.slice.width if placement.slice else out, inner))


def _size(delta: Delta, module: nn.Module) -> str:
    rank, used = delta.placement.rank, delta.in_use()
    if not rank:
        return ""
    size = str(rank) if used == rank else f"{used} of {rank}"
    told = f"rank {size}, scale {delta.placement.scale:g}" if delta.placement.alpha else f"size {size}"
    return f"{told}, fused" if delta.is_fused(module) else told


def _told(adapter: AdapterSummary, base: int) -> str:
    lines = [
        f"  {adapter.name} ({adapter.method}): {adapter.trainable:,} trained of {adapter.parameters:,} parameters, "
        f"{adapter.trainable / max(base, 1):.3%} of the base; {size(adapter.bytes_on_disk)} on disk, "
        f"{size(adapter.bytes_in_optimiser)} in AdamW"
    ]
    lines += [
        f"    {role:<10} {sites:>4} sites  {shape:<14} {rank:<23} {count:>12,}"
        for role, sites, shape, rank, count in adapter.rows
    ]
    if adapter.resting:
        lines.append(f"    {len(adapter.resting)} layers have not acted yet, first {adapter.resting[0]}")
    return "\n".join(lines)


def size(count: float) -> str:
    """Bytes in words.

    >>> size(921600)
    '921.6 kB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"

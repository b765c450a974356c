"""What prefix methods share: how many places they put into the sequence, and vectors that stand there.

Legend: B batch, T tokens, L places after insertion, N places put in, D width of a vector.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.delta import Delta
from lorakit.core.method import Method
from lorakit.core.mode import mode
from lorakit.core.plan import Placement, Plan
from lorakit.core.routing import use
from lorakit.core.stack import embedding_path, longest_of, stack_of
from lorakit.core.state import state_or_new
from lorakit.errors import BadMethod, BadState
from lorakit.methods._targeted import Rules, refuse, whole

_LONGER: Final = "makes the sequence longer"


@dataclass(frozen=True, kw_only=True)
class PrefixMethod(Method):
    """A method that puts places of its own before the tokens, and between context and target."""

    waives: ClassVar[Mapping[str, str]] = {
        "fresh": "places that attention sees are put into the sequence",
        "merge": _LONGER,
        "rows": _LONGER,
    }

    prefix: int = 16  # places put before the tokens
    infix: int = 0  # places put between context and target

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(self, self._rules())

    def _rules(self) -> Rules:
        yield whole("prefix", self.prefix, 0)
        yield whole("infix", self.infix, 0)
        yield "prefix and infix", self.inserts, "one place or more together", self.inserts != (0, 0)

    @property
    def inserts(self) -> tuple[int, int]:
        """The places before the tokens, and those between context and target."""
        return self.prefix, self.infix

    def minds_ties(self, placement: Placement) -> bool:
        """No: a vector that stands at a place of its own leaves every weight alone."""
        return False

    def refuse_too_many(self, model: nn.Module) -> None:
        """Refuse more places than the model's positions leave for the prefix and one token."""
        longest = longest_of(stack_of(model))
        if longest is not None and sum(self.inserts) >= longest:
            raise BadMethod(
                f"{self.name} puts {sum(self.inserts)} places into the sequence (prefix={self.prefix}, "
                f"infix={self.infix}), but {type(model).__name__} has {longest} positions in all; take fewer"
            )

    def shared(self, plan: Plan, model: nn.Module) -> Widths:
        """The widths of the vectors, which a block does not tell by itself."""
        return Widths(model)

    def start(self, deltas: Sequence[Delta], model: nn.Module, statistics: Mapping[Any, Any] | None) -> None:
        """Begin with what the model itself makes of random tokens, at each of the deltas' modules."""
        made = [delta for delta in deltas if isinstance(delta, Vectors)]
        if made and not any(parameter.is_meta for parameter in model.parameters()):
            _start_from_tokens(made, model)


class Widths(nn.Module):
    """How wide a model's word embeddings and hidden states are."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.words = model.get_submodule(embedding_path(model)).get_parameter("weight").shape[1]
        self.hidden = int(cast(Any, stack_of(model)).config.hidden_size)


class AtPlaces(Delta):
    """A delta that acts only where something was put in; elsewhere the module's output stays as it is."""

    per_row = False
    mixes = False
    unmergeable = f"{_LONGER}, which no weight can do"

    def act(self, x: Tensor, y: Tensor, inserted_BL: Tensor | None) -> Tensor:
        """`written` at the places put in, on the site's slice of the module's output."""
        if inserted_BL is None:
            return y
        index_BL = inserted_BL.to(y.device)
        if y.shape[:2] != index_BL.shape:
            raise BadState(
                f"{self.placement.path} has {tuple(y.shape[:2])} places, its prefix needs {tuple(index_BL.shape)}; "
                "with gradient checkpointing, call backward() before the next batch is read"
            )
        return self.within(y, lambda part: torch.where(index_BL[:, :, None] < 0, part, self.written(index_BL, part)))

    @abstractmethod
    def written(self, index_BL: Tensor, y: Tensor) -> Tensor:
        """What stands at each place put in, by its number (anything where the number is -1)."""


class Vectors(AtPlaces):
    """One trained vector for each place put in: (N, D)."""

    def __init__(self, placement: Placement, places: int, width: int) -> None:
        super().__init__(placement, None)
        self.vectors = nn.Parameter(torch.zeros(places, width))

    def written(self, index_BL: Tensor, y: Tensor) -> Tensor:
        return F.embedding(index_BL.clamp(min=0), self.vectors.to(y.dtype))


@torch.no_grad()
def _start_from_tokens(deltas: Sequence[Vectors], model: nn.Module) -> None:
    """Run the base on as many random tokens as there are places, and keep each module's output."""
    stack, places = stack_of(model), len(deltas[0].vectors)
    weight = model.get_submodule(embedding_path(model)).get_parameter("weight")
    ids_1N = torch.randint(weight.shape[0], (1, places)).to(weight.device)
    with ExitStack() as hooks, mode(model, training=False), _base_alone(model):
        for delta in deltas:
            module = model.get_submodule(delta.placement.path)
            hooks.callback(module.register_forward_hook(partial(_keep, delta)).remove)
        stack(input_ids=ids_1N)


def _keep(delta: Vectors, module: nn.Module, args: object, output: Any) -> None:
    y_1ND = output[0] if isinstance(output, tuple) else output
    part = delta.placement.slice
    delta.vectors.copy_((y_1ND if part is None else part.take(y_1ND))[0])


@contextmanager
def _base_alone(model: nn.Module) -> Iterator[None]:
    state = state_or_new(model)
    if state.attached and not state.merged:
        with use(model, None):
            yield
    else:
        yield

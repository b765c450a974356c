"""What prefix methods share: how many places they put into the sequence, and vectors that stand there.

Legend: B batch, T tokens, L places after insertion, N places put in, D width of a vector.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Final, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.delta import Delta
from lorakit.core.files import task_of
from lorakit.core.method import Method, Rules, Tensors
from lorakit.core.mode import mode
from lorakit.core.named import named_tensors
from lorakit.core.plan import Placement, Plan
from lorakit.core.routing import use
from lorakit.core.stack import Reading, embedding_path, longest_of, sites_within, stack_of
from lorakit.core.state import state_or_new
from lorakit.errors import BadMethod, BadState
from lorakit.methods import _peft as peft
from lorakit.methods._targeted import whole

_LONGER: Final = "makes the sequence longer"
PROMPT: Final = "prompt_embeddings"  # PEFT's name of the vectors, side by side
COUNT: Final = "num_virtual_tokens"  # ... and of the number of places
_HEADS: Final = {"CAUSAL_LM": set[str](), "SEQ_CLS": {"classifier", "score"}}  # what PEFT trains beside a prompt


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

    def shared(self, plan: Plan, model: nn.Module) -> Known:
        """The widths of the vectors, which a block does not tell by itself, and what PEFT calls the model."""
        return Known(model, None if self.differs_in_peft(model) else task_of(model))

    def start(self, deltas: Sequence[Delta], model: nn.Module, statistics: Mapping[Any, Any] | None) -> None:
        """Begin with what the model itself makes of random tokens, at each of the deltas' modules."""
        made = [delta for delta in deltas if isinstance(delta, Vectors)]
        if made and not any(parameter.is_meta for parameter in model.parameters()):
            _start_from_tokens(made, model)

    @classmethod
    def differs_in_peft(cls, model: nn.Module) -> str:
        """Why vectors of PEFT's mean something else on a model; "" where they mean the same."""
        reading = Reading.of(stack_of(model))
        if not (reading.leading or reading.bidirectional):
            return ""
        kind = type(model).__name__
        return f"PEFT reads the prefix of a {kind} otherwise: before its first token, or from its decoder"

    @classmethod
    def of_prompt(cls, places: int, train: tuple[str, ...]) -> Self:
        """The method that PEFT's of our `peft_type` is."""
        return cls(prefix=places, train=train)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], tensors: Tensors, model: nn.Module) -> tuple[Self, Plan]:
        """The prefix of a PEFT folder, for models on which it means the same."""
        faults = [] if PROMPT in tensors else [f"{PROMPT} is missing"]
        faults += [why] if (why := cls.differs_in_peft(model)) else []
        peft.refuse_misfits(config, {COUNT: int}, faults)
        method = cls.of_prompt(config.get(COUNT, 0), tuple(dict.fromkeys(peft.trained(config, tensors))))
        return method, method.plan(model)

    def to_peft(self, deltas: Sequence[Delta]) -> tuple[dict[str, Any], Tensors]:
        """PEFT's fields and its one tensor, where PEFT has this prefix on this model; otherwise our own names."""
        vectors = [delta for delta in deltas if isinstance(delta, Vectors)]
        is_here = all(each.vectors.numel() for each in vectors)  # not sharded away, which has a sentence of its own
        shape = self.shape_in_peft(vectors) if is_here and self._is_prompt(vectors) else {}
        if not shape:
            return {"peft_type": self.name.upper().replace("-", "_")}, named_tensors(deltas)
        fields = {
            "peft_type": self.peft_type,
            COUNT: self.prefix,
            "num_layers": vectors[0].known.layers,
            "num_transformer_submodules": 1,
        }
        device = vectors[0].vectors.device  # blocks may be on several
        return fields | shape, {PROMPT: torch.cat([each.vectors.detach().to(device) for each in vectors], 1)}

    def _is_prompt(self, vectors: Sequence[Vectors]) -> bool:
        """Whether it is a prefix alone, where PEFT puts one, with the head that PEFT trains beside it, if any."""
        heads, trained = _HEADS.get(vectors[0].known.task or ""), set(self.train)
        return heads is not None and not self.infix and trained <= heads and bool(trained) == bool(heads)

    @abstractmethod
    def shape_in_peft(self, vectors: Sequence[Vectors]) -> dict[str, Any]:
        """The fields of PEFT's config that tell the vectors' shape; none where it has no such vectors."""

    @torch.no_grad()
    def read(self, deltas: Sequence[Delta], tensors: Tensors) -> list[str]:
        """Copy the vectors out of `tensors`, by our names or side by side under PEFT's."""
        vectors = [delta.vectors for delta in deltas if isinstance(delta, Vectors)]
        if PROMPT not in tensors or len(vectors) < len(deltas):
            return super().read(deltas, tensors)
        widths = [own_ND.shape[1] for own_ND in vectors]
        found, faults = peft.taken({PROMPT: (sum(self.inserts), sum(widths))}, tensors)
        for own_ND, value_ND in zip(vectors, found[PROMPT].split(widths, 1) if found else (), strict=False):
            own_ND.copy_(value_ND)
        return faults


class Known(nn.Module):
    """What a block does not tell of its model: widths, and what PEFT calls the model."""

    def __init__(self, model: nn.Module, task: str | None) -> None:
        super().__init__()
        config = cast(Any, stack_of(model)).config
        self.words = model.get_submodule(embedding_path(model)).get_parameter("weight").shape[1]
        self.hidden = int(config.hidden_size)
        self.layers = len(sites_within(model, "block"))
        self.heads = int(getattr(config, "num_attention_heads", None) or 1)
        self.head_width = int(getattr(config, "head_dim", None) or self.hidden // self.heads)
        self.task = task  # None where PEFT puts no such prefix before the model's tokens


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

    def __init__(self, placement: Placement, places: int, width: int, known: Known) -> None:
        super().__init__(placement, None)
        self.vectors = nn.Parameter(torch.zeros(places, width))
        self.known = known

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

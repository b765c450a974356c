"""How adapters are combined, each a recipe: what becomes of their updates of one matrix.

Task arithmetic (Ilharco et al. 2022) is no recipe of its own: it is Σ w ΔW, which `Concatenation` gives exactly and
`SVD` at a rank, with negative weights for what is to be forgotten.

Legend: I in, O out, R rank.
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Final, Literal, final, get_args

import torch
from torch import Tensor

from lorakit.analyse.matrices import Dense, Thin, Wanted
from lorakit.analyse.subspace import Pair
from lorakit.errors import BadMethod, UnknownName, nearest

Election = Literal["mass", "frequency"]


@dataclass(frozen=True, eq=False)
class Task:
    """One adapter's update of one matrix: w ΔW = strength · B A, where strength is its weight times its scale."""

    name: str  # of the matrix, for messages
    a_RI: Tensor
    b_OR: Tensor
    strength: float


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """A way to combine updates of one matrix; its fields are its options."""

    @abstractmethod
    def wanted(self, tasks: Sequence[Task]) -> Wanted:
        """The matrix that the result stands for, from which its distance is measured."""

    @abstractmethod
    def factors(self, tasks: Sequence[Task], wanted: Wanted) -> Pair:
        """The result, A (R, I) and B (O, R)."""


@dataclass(frozen=True, kw_only=True)
class Truncated(Recipe):
    """What is wanted at a rank (None: the largest of the tasks' own), by SVD."""

    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise BadMethod(f"adapters cannot be combined at rank {self.rank}; give 1 or more")

    def factors(self, tasks: Sequence[Task], wanted: Wanted) -> Pair:
        return wanted.nearest(self.rank or max(len(task.a_RI) for task in tasks))


@final
@dataclass(frozen=True, kw_only=True)
class Linear(Recipe):
    """Factors added up, as PEFT's `linear` does: A = Σ sign(s) √|s| A_i and B = Σ √|s| B_i with s = weight · scale.

    One adapter is scaled exactly. Of several, (Σ √s B_i)(Σ √s A_i) also holds products of one's B and another's A,
    which nobody trained: the distance from Σ w ΔW tells how much of them there is.
    """

    def wanted(self, tasks: Sequence[Task]) -> Thin:
        return summed(tasks)

    def factors(self, tasks: Sequence[Task], wanted: Wanted) -> Pair:
        ranks = sorted({len(task.a_RI) for task in tasks})
        if len(ranks) > 1:
            raise BadMethod(
                f"linear adds factors of one rank, but those of {tasks[0].name} have the ranks "
                f"{' and '.join(map(str, ranks))}; combine by concatenation or svd"
            )
        roots = [math.sqrt(abs(task.strength)) for task in tasks]
        signed = [math.copysign(root, task.strength) for root, task in zip(roots, tasks, strict=True)]
        a_RI = torch.stack([root * task.a_RI for root, task in zip(signed, tasks, strict=True)]).sum(0)
        return a_RI, torch.stack([root * task.b_OR for root, task in zip(roots, tasks, strict=True)]).sum(0)


@final
@dataclass(frozen=True, kw_only=True)
class Concatenation(Recipe):
    """Σ w ΔW exactly, at the sum of the ranks: A = [A_1; A_2; …], B = [s_1 B_1, s_2 B_2, …] with s = weight · scale."""

    def wanted(self, tasks: Sequence[Task]) -> Thin:
        return summed(tasks)

    def factors(self, tasks: Sequence[Task], wanted: Wanted) -> Pair:
        own = summed(tasks).narrow()
        return own.a_RI, own.b_OR


@final
@dataclass(frozen=True, kw_only=True)
class SVD(Truncated):
    """Σ w ΔW, and of that the largest singular values; exact where the rank is the sum of the ranks."""

    def wanted(self, tasks: Sequence[Task]) -> Thin:
        return summed(tasks)


@dataclass(frozen=True, kw_only=True)
class Thinned(Truncated):
    """Updates of which only a share of the entries, the density, takes part."""

    density: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.density <= 1:
            raise BadMethod(f"updates cannot be thinned to a density of {self.density:g}; give more than 0, at most 1")

    def wanted(self, tasks: Sequence[Task]) -> Dense:
        return Dense(self.united(lambda: (task.strength * self.thin(task.b_OR @ task.a_RI, task) for task in tasks)))

    @abstractmethod
    def thin(self, delta_OI: Tensor, task: Task) -> Tensor:
        """What takes part of one update."""

    @abstractmethod
    def united(self, parts: Callable[[], Iterator[Tensor]]) -> Tensor:
        """The one matrix that the weighted parts become; each call makes them anew, so that few are there at once."""


@final
@dataclass(frozen=True, kw_only=True)
class TIES(Thinned):
    """Trim, elect a sign for each entry, and average those that agree (Yadav et al. 2023), matrix by matrix.

    Of each ΔW the `density` largest entries stay. Weights come first: a negative one turns a vote round, and the mean
    is Σ w ΔW over the number that agree. The sign elected is that of the mass Σ w ΔW, or of most votes (the mass breaks
    a tie); where the mass is 0, too, so is the entry. For equal weights this is PEFT's `ties_svd` but for such ties.
    """

    density: float = 0.2
    election: Election = "mass"

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_unknown(self.election)

    def thin(self, delta_OI: Tensor, task: Task) -> Tensor:
        size = delta_OI.abs()
        kept = max(round(self.density * size.numel()), 1)
        return delta_OI * (size >= size.flatten().kthvalue(size.numel() - kept + 1).values)

    def united(self, parts: Callable[[], Iterator[Tensor]]) -> Tensor:
        return _elected(parts, self.election)


@dataclass(frozen=True, kw_only=True)
class Dropped(Thinned):
    """Each entry stays with the probability `density`, divided by it, so that its expectation is what it was.

    What is drawn depends on the seed and the update alone, not on the other adapters or their order.
    """

    density: float = 0.5
    seed: int = 0

    def thin(self, delta_OI: Tensor, task: Task) -> Tensor:
        told = f"{self.seed} {task.name} ".encode() + task.a_RI.numpy().tobytes() + task.b_OR.numpy().tobytes()
        generator = torch.Generator().manual_seed(zlib.crc32(told))
        return delta_OI * (torch.rand(delta_OI.shape, generator=generator) < self.density) / self.density


@final
@dataclass(frozen=True, kw_only=True)
class DARE(Dropped):
    """Drop entries at random, rescale the rest, add up (Yu et al. 2023); the expectation is Σ w ΔW."""

    def united(self, parts: Callable[[], Iterator[Tensor]]) -> Tensor:
        return sum(parts(), start=torch.zeros(()))


@final
@dataclass(frozen=True, kw_only=True)
class DareTIES(Dropped):
    """Drop entries at random, rescale the rest, then elect signs and average those that agree, as TIES does."""

    election: Election = "mass"

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_unknown(self.election)

    def united(self, parts: Callable[[], Iterator[Tensor]]) -> Tensor:
        return _elected(parts, self.election)


RECIPES: Final[Mapping[str, type[Recipe]]] = MappingProxyType(
    {
        "linear": Linear,
        "concatenation": Concatenation,
        "svd": SVD,
        "ties": TIES,
        "dare": DARE,
        "dare-ties": DareTIES,
    }
)


def recipe(name: str, **options: Any) -> Recipe:
    """The recipe of a name, with its options.

    Raises:
        UnknownName: no recipe is called so, or it has no such option.
        BadMethod: an option's value is out of its range.

    >>> recipe("ties", density=0.5)
    TIES(rank=None, density=0.5, election='mass')
    """
    if name not in RECIPES:
        raise UnknownName(f"adapters cannot be combined by {name!r}; {nearest(name, RECIPES)}")
    kind = RECIPES[name]
    have = {field.name for field in fields(kind)}
    for option in options:
        if option not in have:
            raise UnknownName(f"{name} has no option {option!r}; {nearest(option, have)}")
    return kind(**options)


def summed(tasks: Sequence[Task]) -> Thin:
    """Σ strength · B A, in float64."""
    columns = [task.strength * task.b_OR.double() for task in tasks]
    return Thin(torch.cat([task.a_RI.double() for task in tasks]), torch.cat(columns, 1))


def _refuse_unknown(election: str) -> None:
    if election not in get_args(Election):
        raise UnknownName(f"signs cannot be elected by {election!r}; {nearest(election, get_args(Election))}")


def _elected(parts: Callable[[], Iterator[Tensor]], election: Election) -> Tensor:
    mass_OI = votes_OI = total_OI = count_OI = torch.zeros(())
    for part_OI in parts():
        mass_OI, votes_OI = mass_OI + part_OI, votes_OI + part_OI.sign()
    by_votes = election == "frequency"
    sign_OI = torch.where(votes_OI != 0, votes_OI, mass_OI).sign() if by_votes else mass_OI.sign()
    for part_OI in parts():
        agrees_OI = part_OI.sign() == sign_OI
        total_OI, count_OI = total_OI + part_OI * agrees_OI, count_OI + agrees_OI
    return total_OI / count_OI.clamp(min=1)

"""How low-rank factors begin: an initialisation is a file of `inits/`, found by its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lorakit.core import registry
from lorakit.core.statistics import SiteStatistics
from lorakit.errors import BadMethod

Init = Callable[[Tensor, int, SiteStatistics | None], tuple[Tensor, Tensor]]
Ranks = Callable[[Sequence[SiteStatistics], int], list[int]]


@dataclass(frozen=True)
class Initialisation:
    """What a file of `inits/` declares.

    `init(weight_OI, rank, statistics)` gives A (rank, in) and B (out, rank), float32 on the CPU. `needs` names the
    statistics it reads (words of `calibrate`). `splits` says that B A is meant as the update itself, so each factor is
    divided by the square root of the scale. `ranks` shares a rank out over all sites, 0 for a site to leave
    out. `random` says that the weight decides nothing but the shapes.
    """

    name: str
    init: Init
    needs: frozenset[str] = frozenset()
    splits: bool = False
    ranks: Ranks | None = None
    random: bool = False

    def factors(
        self, weight_OI: Tensor, rank: int, statistics: SiteStatistics | None, path: str
    ) -> tuple[Tensor, Tensor]:
        """`init`, with the layer's path in whatever it refuses.

        Raises:
            BadMethod: the matrix, the rank or the statistics do not serve.
        """
        if statistics is not None and statistics.shape != tuple(weight_OI.shape):
            raise BadMethod(f"the statistics of {path} are of {statistics.shape}, not of {tuple(weight_OI.shape)}")
        try:
            return self.init(weight_OI, rank, statistics)
        except BadMethod as error:
            raise BadMethod(f"{path} cannot be initialised by {self.name!r}: {error}") from error


def initialisation(name: str) -> Initialisation:
    """The initialisation of the file `name` in `inits/`.

    >>> initialisation("pissa").splits, initialisation("kaiming").needs
    (True, frozenset())

    Raises:
        UnknownName: no such file.
    """
    module = registry.find("lorakit.inits", name)
    return Initialisation(
        name,
        module.init,
        frozenset(getattr(module, "NEEDS", ())),
        getattr(module, "SPLITS", False),
        getattr(module, "ranks", None),
        getattr(module, "RANDOM", False),
    )

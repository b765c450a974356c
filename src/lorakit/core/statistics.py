"""What is known of a layer's data: moments of what it sees and gives, and gradients, at one site.

Legend: N vectors (tokens) of one batch, D their width, I in, O out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from lorakit.core.sites import Slice
from lorakit.errors import BadMethod

FOLDS: Final = 5  # parts that cross-validation divides the data into
_WORDS: Final = {
    "inputs": "the moments of the layer's inputs",
    "outputs": "the moments of the layer's outputs",
    "errors": "the moments of the gradients at the layer's output",
    "folds": "the moments of the layer's inputs in parts",
    "gradient": "the gradients of the loss",
    "norms": "the mean norms of what the layer sees and gives",
}
NEEDS: Final = tuple(_WORDS)  # what `calibrate` can gather


@dataclass(frozen=True, eq=False)
class Moment:
    """How vectors are distributed: their number, mean and covariance (divided by their number).

    The centred form is kept, since the difference E[x xᵀ] - mean meanᵀ is lost to rounding where means are large.
    """

    tokens: int
    mean_D: Tensor
    covariance_DD: Tensor

    @property
    def second(self) -> Tensor:
        """E[x xᵀ] (D, D), not centred."""
        return self.about(torch.zeros_like(self.mean_D))

    def about(self, centre_D: Tensor) -> Tensor:
        """E[(x - c)(x - c)ᵀ] about any centre c.

        >>> moment = Moment(2, torch.tensor([1.0, 2.0]), torch.eye(2))
        >>> moment.about(torch.zeros(2)).tolist()
        [[2.0, 2.0], [2.0, 5.0]]
        """
        away_D = self.mean_D - centre_D
        return self.covariance_DD + torch.outer(away_D, away_D)


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteStatistics:
    """What `calibrate` gathered at one site, all on the CPU in float32; None where it was not asked for."""

    shape: tuple[int, int]  # of W: out, in
    tokens: int  # positions that were counted
    inputs: Moment | None = None  # of x
    outputs: Moment | None = None  # of y = W x + b, as the layer gives it
    errors: Moment | None = None  # of the gradient of the loss at y, a token
    folds: tuple[Moment, ...] = ()  # of x, in FOLDS parts of whole sequences
    gradient_OI: Tensor | None = None  # of the loss by W, mean over batches
    norm_in: float | None = None  # mean of ‖x‖
    norm_out: float | None = None  # mean of ‖W x‖


Key = tuple[str, Slice | None]  # a site's path and slice
Statistics = dict[Key, SiteStatistics]


@final
class Running:
    """Mean and scatter of a stream of vectors, updated a batch at a time in centred form (Chan et al. 1983)."""

    def __init__(self) -> None:
        self.tokens = 0
        self._mean_D = self._scatter_DD = torch.empty(0)

    def add(self, x_ND: Tensor) -> None:
        """Take in the rows of a float32 matrix.

        >>> running = Running()
        >>> running.add(torch.tensor([[1.0], [2.0]]))
        >>> running.add(torch.tensor([[6.0]]))
        >>> running.moment().mean_D.item(), round(running.moment().covariance_DD.item(), 4)
        (3.0, 4.6667)
        """
        count, width = x_ND.shape
        if not count:
            return
        if not self.tokens:
            self._mean_D, self._scatter_DD = x_ND.new_zeros(width), x_ND.new_zeros(width, width)
        mean_D = x_ND.mean(0)
        centred_ND, step_D, total = x_ND - mean_D, mean_D - self._mean_D, self.tokens + count
        self._scatter_DD.addmm_(centred_ND.T, centred_ND)
        self._scatter_DD.addr_(step_D, step_D, alpha=self.tokens * count / total)
        self._mean_D += step_D * (count / total)
        self.tokens = total

    def moment(self) -> Moment:
        """What has been seen until now, on the CPU."""
        return Moment(self.tokens, self._mean_D.cpu(), (self._scatter_DD / max(self.tokens, 1)).cpu())


def merged(moments: Sequence[Moment]) -> Moment:
    """The moment of all vectors of several moments together, worked out in float64."""
    some = [moment for moment in moments if moment.tokens]
    total = sum(moment.tokens for moment in some)
    shares = [moment.tokens / total for moment in some]
    mean_D = torch.stack([moment.mean_D.double() * s for moment, s in zip(some, shares, strict=True)]).sum(0)
    covariance_DD = torch.zeros(len(mean_D), len(mean_D), dtype=torch.float64)
    for moment, share in zip(some, shares, strict=True):
        covariance_DD += moment.about(mean_D) * share
    return Moment(total, mean_D.float(), covariance_DD.float())


def explained(moment: Moment, most: int) -> Tensor:
    """The shares of the variance along the first `most` principal directions, largest first (float64).

    >>> explained(Moment(9, torch.zeros(3), torch.diag(torch.tensor([1.0, 6.0, 3.0]))), most=2).tolist()
    [0.6, 0.3]
    """
    variances_D = torch.linalg.eigvalsh(moment.covariance_DD.double()).flip(0).clamp(min=0)
    whole = variances_D.sum()
    return variances_D[:most] / whole if whole > 0 else torch.zeros_like(variances_D[:most])


def moment_of(statistics: SiteStatistics | None, name: str, rank: int) -> Moment:
    """The moment called `name` ("inputs", "outputs", "errors"), of more vectors than `rank`.

    Raises:
        BadMethod: it was not gathered, or from too few tokens to have `rank` directions.
    """
    found: Moment | None = None if statistics is None else getattr(statistics, name)
    if found is None:
        raise not_gathered(name)
    if found.tokens <= rank:
        raise BadMethod(
            f"{_WORDS[name]} come from too few tokens ({found.tokens}), which span fewer than {rank} directions about "
            f"their mean; calibrate on more than {rank} tokens, or take a smaller rank"
        )
    return found


def gradient_of(statistics: SiteStatistics | None) -> Tensor:
    """The mean gradient G (out, in).

    Raises:
        BadMethod: it was not gathered, or is zero everywhere.
    """
    if statistics is None or statistics.gradient_OI is None:
        raise not_gathered("gradient")
    if not bool(statistics.gradient_OI.any()):
        raise BadMethod("the gradient of the loss is zero everywhere, so it has no directions; calibrate on other data")
    return statistics.gradient_OI


def not_gathered(name: str) -> BadMethod:
    """The error for a statistic that is needed and absent."""
    return BadMethod(
        f"{_WORDS[name]} are needed and were not gathered; "
        f'pass calibration data, or statistics of calibrate(model, sites, batches, needs=("{name}",))'
    )

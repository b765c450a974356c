"""What an adapter learned, as numbers: the study of Hu et al. 2021, section 7, and what grew out of it."""

from lorakit.analyse.amplification import Against, against, amplification, overlap, projected, random_norm
from lorakit.analyse.depth import Patterns, over_depth, patterns, unit_norms
from lorakit.analyse.intruders import Intruders, intruders
from lorakit.analyse.randomised import Blocks, Top, blocks, top
from lorakit.analyse.spectra import (
    ByLayer,
    Spectrum,
    by_layer,
    effective_between,
    effective_rank,
    numerical_rank,
    smallest_rank,
    spectra,
    stable_rank,
)
from lorakit.analyse.subspace import (
    Frames,
    directions,
    expected,
    expected_grid,
    grid,
    random_grid,
    similarities,
    similarity,
)

__all__ = [
    "Against",
    "Blocks",
    "ByLayer",
    "Frames",
    "Intruders",
    "Patterns",
    "Spectrum",
    "Top",
    "against",
    "amplification",
    "blocks",
    "by_layer",
    "directions",
    "effective_between",
    "effective_rank",
    "expected",
    "expected_grid",
    "grid",
    "intruders",
    "numerical_rank",
    "over_depth",
    "overlap",
    "patterns",
    "projected",
    "random_grid",
    "random_norm",
    "similarities",
    "similarity",
    "smallest_rank",
    "spectra",
    "stable_rank",
    "top",
    "unit_norms",
]

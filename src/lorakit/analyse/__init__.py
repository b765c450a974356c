"""What an adapter learned, as numbers: the study of Hu et al. 2021, section 7, and what grew out of it."""

from lorakit.analyse.alike import alike
from lorakit.analyse.amplification import Against, against, amplification, overlap, projected, random_norm
from lorakit.analyse.compare import Comparison, Meeting, Within, compare, sign_conflicts
from lorakit.analyse.compress import Choice, Compressed, compress
from lorakit.analyse.depth import Patterns, over_depth, patterns, unit_norms
from lorakit.analyse.difference import Difference, difference
from lorakit.analyse.divergence import divergence
from lorakit.analyse.effect import Drift, Effect, LayerEffect, TokenEffect, effect
from lorakit.analyse.examples import Disagreement, Place, Prediction, disagreements
from lorakit.analyse.html import render, write
from lorakit.analyse.intruders import Intruders, intruders
from lorakit.analyse.merging import Merged, merge_adapters
from lorakit.analyse.page import Bars, HeatMap, Lines, Page, Section, Table, Tokens
from lorakit.analyse.randomised import Blocks, Top, blocks, top
from lorakit.analyse.ranks import at_most, keeping, within_parameters, within_ranks
from lorakit.analyse.recipes import RECIPES, Recipe, Task, recipe
from lorakit.analyse.report import report
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
from lorakit.analyse.study import Study
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
    "RECIPES",
    "Against",
    "Bars",
    "Blocks",
    "ByLayer",
    "Choice",
    "Comparison",
    "Compressed",
    "Difference",
    "Disagreement",
    "Drift",
    "Effect",
    "Frames",
    "HeatMap",
    "Intruders",
    "LayerEffect",
    "Lines",
    "Meeting",
    "Merged",
    "Page",
    "Patterns",
    "Place",
    "Prediction",
    "Recipe",
    "Section",
    "Spectrum",
    "Study",
    "Table",
    "Task",
    "TokenEffect",
    "Tokens",
    "Top",
    "Within",
    "against",
    "alike",
    "amplification",
    "at_most",
    "blocks",
    "by_layer",
    "compare",
    "compress",
    "difference",
    "directions",
    "disagreements",
    "divergence",
    "effect",
    "effective_between",
    "effective_rank",
    "expected",
    "expected_grid",
    "grid",
    "intruders",
    "keeping",
    "merge_adapters",
    "numerical_rank",
    "over_depth",
    "overlap",
    "patterns",
    "projected",
    "random_grid",
    "random_norm",
    "recipe",
    "render",
    "report",
    "sign_conflicts",
    "similarities",
    "similarity",
    "smallest_rank",
    "spectra",
    "stable_rank",
    "top",
    "unit_norms",
    "within_parameters",
    "within_ranks",
    "write",
]

"""Choose which weights to adapt, by what calibration data say of them."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import NamedTuple

from lorakit.core.choose import NEEDS, By, Choice, check_terms, choose, weights_of
from lorakit.core.layouts import LinearLayout
from lorakit.core.sites import resolve
from lorakit.data import Data
from lorakit.errors import BadMethod
from lorakit.models import Quantise
from lorakit.reproduce.calibration import gathered
from lorakit.reproduce.run import Dtype, feed, prepare
from lorakit.train import Train

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Question:
    """Which weights of `base` are worth adapting to `data`, for a number of trained numbers."""

    base: str  # a packaged model, a folder, a GGUF file or a hub id
    data: Data  # what is to be learned
    budget: int  # trained numbers to spend, all sites together
    by: By = "gradient"  # what speaks for a site: gradient energy, explained variance, or (low) normalised feature norm
    targets: tuple[str, ...] = ("linear",)  # the candidates: roles, groups or globs
    rank: int = 8  # the largest rank of one site
    calibrate_on: int = 256  # training examples to look at
    quantise: Quantise = "none"  # keep the base's layers in 8 or 4 bits, or a GGUF file's as they are
    dtype: Dtype = "auto"  # of the base; auto: bfloat16 on a GPU, float32 on a CPU
    train: Train = field(default_factory=Train)  # batch size, seed and length of the examples


def answer(question: Question) -> list[Choice]:
    """The chosen sites with their ranks, best first.

    Raises:
        BadMethod: targets without a linear layer, and what `check_terms` refuses; before anything is gathered.
        BadData: no example, or one that gives NaN.
    """
    model, tokenizer, data = prepare(question)
    found = resolve(model, question.targets)
    sites = [site for site in found if isinstance(site.layout, LinearLayout)]
    if not sites:
        raise BadMethod(f"{', '.join(question.targets)} hold no linear layer, and no others can be ranked; give other "
                        "targets, such as linear")  # fmt: skip
    check_terms(sites, budget=question.budget, by=question.by, rank=question.rank)
    if len(sites) < len(found):
        log.warning("%d places are left out: only linear layers can be ranked, not experts", len(found) - len(sites))
    examples = feed(model, tokenizer, data, question.train)
    needs, most = NEEDS[question.by], question.calibrate_on
    statistics = gathered(model, sites, needs, examples, question.train, most)
    weights = weights_of(model, sites)
    return choose(sites, statistics, weights, budget=question.budget, by=question.by, rank=question.rank)


class Fields(NamedTuple):
    """A choice as fields of a low-rank method."""

    targets: list[str]
    ranks: dict[str, int]


def fields_of(choices: list[Choice]) -> Fields:
    """The choice as `role@path` targets, and a rank for each."""
    ranks = {f"{choice.site.role}@{choice.site.path}": choice.rank for choice in choices}
    return Fields(sorted(ranks), dict(sorted(ranks.items())))

"""Each initialisation that PEFT has gives PEFT's factors, up to the signs of singular vectors, which are free."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.core.calibrate import calibrate
from lorakit.core.choose import weights_of
from lorakit.core.initialise import initialisation
from lorakit.core.sites import Site, resolve
from lorakit.core.statistics import Statistics
from tests.laws.cases import close
from tests.tiny import tiny, tokens

pytestmark = pytest.mark.filterwarnings("ignore")

RANK, ALPHA = 4, 8.0  # the scale is 2
TARGETS = {
    "llama": {"q_proj": "attn.q", "v_proj": "attn.v", "down_proj": "mlp.down"},
    "gpt2": {"attn.c_proj": "attn.o", "mlp.c_fc": "mlp.up"},
}
Factors = tuple[Tensor, Tensor]


def config(family: str, init: str, **fields: Any) -> LoraConfig:
    sizes = dict(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS[family]), fan_in_fan_out=family == "gpt2")
    return LoraConfig(init_lora_weights=init, **{**sizes, **fields})


def theirs(model: PeftModel) -> dict[str, Factors]:
    """PEFT's A and B by the path of the layer."""
    found = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            found[name] = (module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach())
    return found


def ours(
    model: nn.Module, family: str, name: str, statistics: Statistics | None = None, rank: int = RANK
) -> dict[str, Factors]:
    """Our A and B by path, as a low-rank delta of scale ALPHA / RANK takes them."""
    init, found = initialisation(name), {}
    sites = resolve(model, list(TARGETS[family].values()))
    root = math.sqrt(ALPHA / RANK) if init.splits else 1.0
    for (path, part), weight in weights_of(model, sites).items():
        known = None if statistics is None else statistics[path, part]
        a_RI, b_OR = init.factors(weight, rank, known, path)
        found[path] = (a_RI / root, b_OR / root)
    return found


def gathered(model: nn.Module, family: str, *needs: str, batch: dict[str, Tensor]) -> Statistics:
    return calibrate(model, resolve(model, list(TARGETS[family].values())), [batch], needs=needs)


def same_up_to_signs(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether the rows agree but for a sign each."""
    return close((one * other).sum(1).sign()[:, None] * one, other, tolerance)


def check_products(mine: dict[str, Factors], reference: dict[str, Factors], tolerance: float = 1e-5) -> None:
    assert mine.keys() == reference.keys()
    for path, (a_RI, b_OR) in mine.items():
        assert close(b_OR @ a_RI, reference[path][1] @ reference[path][0], tolerance), path


@pytest.mark.parametrize("family", TARGETS)
def test_pissa(family: str) -> None:
    mine, reference = ours(tiny(family), family, "pissa"), theirs(get_peft_model(tiny(family), config(family, "pissa")))
    check_products(mine, reference)
    for path, (a_RI, b_OR) in mine.items():
        assert same_up_to_signs(a_RI, reference[path][0]) and same_up_to_signs(b_OR.T, reference[path][1].T)


def test_olora() -> None:
    """On Linear layers: PEFT takes a Conv1D's transposed weight for W, and changes the model's output or fails."""
    mine = ours(tiny("llama"), "llama", "olora")
    reference = theirs(get_peft_model(tiny("llama"), config("llama", "olora")))
    check_products(mine, reference)
    for path, (a_RI, b_OR) in mine.items():
        assert same_up_to_signs(a_RI, reference[path][0]) and same_up_to_signs(b_OR.T, reference[path][1].T)


def test_orthogonal_draws_what_peft_draws() -> None:
    model = get_peft_model(tiny("llama"), config("llama", "orthogonal"))
    path = "model.layers.0.mlp.down_proj"
    layer = model.base_model.model.get_submodule(path)
    torch.manual_seed(3)
    layer.orthogonal_init("default")
    torch.manual_seed(3)
    a_RI, b_OR = initialisation("orthogonal").init(layer.base_layer.weight, RANK, None)
    assert close(a_RI, layer.lora_A["default"].weight) and close(b_OR, layer.lora_B["default"].weight)


@pytest.fixture
def corda(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """PEFT's module, which takes `dataclass` from attrs, a package that it does not depend on."""
    if importlib.util.find_spec("attr") is None:
        attr = ModuleType("attr")
        attr.dataclass = dataclasses.dataclass  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "attr", attr)
    return importlib.import_module("peft.tuners.lora.corda")


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("family", TARGETS)
def test_corda(family: str, mode: str, corda: ModuleType) -> None:
    """One batch of one row, since PEFT takes no other and weighs each batch by its largest entry.

    PEFT inverts the moment in float32, which costs it the digits that the tolerance gives back.
    """
    model, batch = tiny(family), {"input_ids": tokens(tiny(family), rows=1, length=60)}
    settings = config(family, "corda", corda_config=CordaConfig(corda_method=mode))
    corda.preprocess_corda(model, settings, run_model=lambda: model(**batch))
    reference = theirs(get_peft_model(model, settings))
    plain = tiny(family)
    name = "covariance-corda" if mode == "ipm" else "covariance-corda-kpm"
    mine = ours(plain, family, name, gathered(plain, family, "inputs", batch=batch))
    check_products(mine, reference, 2e-4)
    for path, (a_RI, b_OR) in mine.items():  # PEFT's moment is of another size, which moves a factor between A and B
        a, b = reference[path]
        assert same_up_to_signs(a_RI / a_RI.norm(), a / a.norm(), 1e-3)
        assert same_up_to_signs(b_OR.T / b_OR.norm(), b.T / b.norm(), 1e-3)


@pytest.mark.parametrize("splits", [(6,), (2, 4)], ids=str)
def test_gradient(splits: tuple[int, ...]) -> None:
    """On Linear layers: PEFT reads a Conv1D's width off the wrong side of its weight, and scales by that.

    At rank 8, since PEFT's randomised search is exact only where 4 · rank is the smaller side of the matrix.
    """
    ids = tokens(tiny("llama"), rows=6)
    batches = [{"input_ids": each, "labels": each} for each in ids.split(list(splits))]
    model, settings = tiny("llama"), config("llama", "lora_ga", r=8, lora_ga_config=LoraGAConfig())

    def steps() -> None:
        for batch in batches:
            model(**batch).loss.backward()

    preprocess_loraga(model, settings, steps)
    reference = theirs(get_peft_model(model, settings))
    plain = tiny("llama")
    sites = resolve(plain, list(TARGETS["llama"].values()))
    mine = ours(plain, "llama", "gradient", calibrate(plain, sites, batches, needs=("gradient",)), 8)
    assert mine.keys() == reference.keys()
    for path, (a_RI, b_OR) in mine.items():
        assert same_up_to_signs(a_RI, reference[path][0])
        assert same_up_to_signs(b_OR.T, reference[path][1].T, 1e-4)  # rounding over the gaps of neighbouring values


def uneven(model: PreTrainedModel) -> PreTrainedModel:
    """The model with embeddings along few directions, so that layers differ in how many explain their inputs."""
    embeddings = model.get_input_embeddings().weight.data
    embeddings[:, 3:] *= 0.05
    return model


def eva() -> tuple[dict[str, Factors], list[Site], Statistics]:
    """PEFT's factors from one padded batch, and our statistics of the same batch; its search is exact in width 16."""
    small = dict(hidden_size=16, num_attention_heads=2, num_key_value_heads=2, intermediate_size=16)
    ids = tokens(tiny("llama"), rows=12, length=20)
    mask = (torch.arange(20) < 20 - torch.arange(12)[:, None]).long()
    batch = {"input_ids": ids, "attention_mask": mask}
    model = get_peft_model(uneven(tiny("llama", **small)), config("llama", "eva", eva_config=EvaConfig(rho=2.0)))
    initialize_lora_eva_weights(model, [batch], show_progress_bar=False)
    plain = uneven(tiny("llama", **small))
    sites = resolve(plain, list(TARGETS["llama"].values()))
    return theirs(model), sites, calibrate(plain, sites, [batch])


def test_eva_takes_peft_directions() -> None:
    reference, sites, statistics = eva()
    init = initialisation("covariance-eva")
    for site in sites:
        a, b = reference[site.path]
        a_RI, b_OR = init.init(torch.zeros(16, 16), len(a), statistics[site.path, None])
        assert same_up_to_signs(a_RI, a), site.path
        assert not b_OR.any() and not b.any()


def test_eva_shares_ranks_out_as_peft_does() -> None:
    """q and v see one input and so tie; which of them gets the odd direction is not defined, so they are sorted."""
    reference, sites, statistics = eva()
    init = initialisation("covariance-eva")
    assert init.ranks is not None
    mine = init.ranks([statistics[site.path, site.slice] for site in sites], RANK)
    peft = [len(reference[site.path][0]) if site.path in reference else 0 for site in sites]

    def by_input(ranks: list[int]) -> list[list[int]]:
        moments = [statistics[site.path, site.slice].inputs for site in sites]
        return [sorted(r for r, other in zip(ranks, moments, strict=True) if other is each) for each in moments]

    assert by_input(mine) == by_input(peft)
    assert sum(mine) == RANK * len(sites) and len(set(mine)) > 1

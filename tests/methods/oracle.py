"""PEFT as an oracle: the same adapter in both libraries, through files, forward passes and five steps of AdamW."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

import lorakit as lk
from tests.laws.cases import close, output
from tests.tiny import tiny, tokens


def written_by_peft(family: str, config: PeftConfig, folder: Path) -> PeftModel:
    """PEFT's model with scrambled numbers, which it also wrote to a folder."""
    theirs = get_peft_model(tiny(family), config).eval()
    scramble_peft(theirs)
    theirs.save_pretrained(folder)
    return theirs


@torch.no_grad()
def scramble_peft(model: nn.Module) -> None:
    """Move what PEFT trains away from where it starts."""
    for value in model.parameters():
        if value.requires_grad:
            value += 0.1 * torch.randn_like(value)


def read_by_peft(family: str, folder: Path) -> PeftModel:
    """PEFT's reading of a folder."""
    return PeftModel.from_pretrained(tiny(family), folder).eval()


def loaded(family: str, folder: Path, *, trainable: bool = False) -> PreTrainedModel:
    """Our reading of a folder, as the adapter "a"."""
    model = tiny(family)
    lk.load(model, folder, "a", trainable=trainable)
    return model


def goes_both_ways(family: str, config: PeftConfig, folder: Path) -> None:
    """What PEFT writes gives the same outputs here, and what we write of it gives them in PEFT again."""
    theirs = written_by_peft(family, config, folder / "theirs")
    assert not close(output(theirs), output(tiny(family)), 1e-3)
    ours = loaded(family, folder / "theirs")
    assert close(output(ours), output(theirs))
    lk.save(ours, "a", folder / "ours")
    assert close(output(read_by_peft(family, folder / "ours")), output(theirs))


def steps_agree(family: str, config: PeftConfig, folder: Path) -> None:
    """Five steps of AdamW from the same numbers end at the same numbers, each to a relative 1e-4."""
    theirs = written_by_peft(family, config, folder / "theirs")
    ours, before = loaded(family, folder / "theirs", trainable=True), get_peft_model_state_dict(theirs)
    before = {key: value.clone() for key, value in before.items()}
    ids = tokens(ours)
    five_steps(theirs, (p for p in theirs.parameters() if p.requires_grad), ids)
    five_steps(ours, lk.parameters(ours), ids)
    lk.save(ours, "a", folder / "ours")
    found = get_peft_model_state_dict(read_by_peft(family, folder / "ours"))
    moved = [key for key, value in get_peft_model_state_dict(theirs).items() if not torch.equal(value, before[key])]
    assert moved
    for key, value in get_peft_model_state_dict(theirs).items():
        assert (found[key] - value).norm() <= 1e-4 * value.norm(), key


def five_steps(model: nn.Module, parameters: Iterable[Tensor], ids: Tensor) -> None:
    """Train on a fixed batch."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for _ in range(5):
        model(input_ids=ids)[0].pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

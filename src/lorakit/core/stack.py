"""The stack: the module that turns token ids into hidden states, and how it reads a sequence."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Self, cast

from torch import nn

from lorakit.core.sites import Site, family_of, modules_of, sites_of
from lorakit.errors import BadMethod


@dataclass(frozen=True)
class Reading:
    """How a stack reads: what it is called with, and what it makes of a sequence."""

    names: tuple[str, ...]
    bidirectional: bool  # whether a token sees those after it
    leading: int  # tokens that have to stay first
    filler: int  # a token that is not the padding
    longest: int | None  # the most places there may be
    types_are_words: bool  # whether token types are looked up among the word embeddings (GPT-2)

    @classmethod
    def of(cls, stack: nn.Module) -> Self:
        """The reading of a stack, found once: a forward pass looks nothing up."""
        config, family, names = getattr(stack, "config", None), family_of(stack), inputs_of(stack)
        return cls(
            tuple(names),
            family.bidirectional,
            family.leading,
            filler=1 if getattr(config, "pad_token_id", None) == 0 else 0,
            longest=longest_of(stack),
            types_are_words="token_type_ids" in names and getattr(config, "type_vocab_size", None) is None,
        )


def stack_of(model: nn.Module) -> nn.Module:
    """The module that holds the blocks and is called with token ids.

    Raises:
        BadMethod: the model has none (it reads images, say).
    """
    return model.get_submodule(stack_path(model))


def stack_path(model: nn.Module) -> str:
    """The path of the stack ("" for the model itself)."""
    path = next((site.path for site in sites_of(model) if site.role == "block"), "")
    while path:
        path = path.rpartition(".")[0]
        if "input_ids" in inputs_of(model.get_submodule(path)):
            return path
    kind = type(model).__name__
    raise BadMethod(f"{kind} has no blocks that read token ids, so nothing can be put between its tokens")


def sites_within(model: nn.Module, *roles: str) -> list[Site]:
    """The sites of these roles that lie in the stack (an encoder's, where there is a decoder, too)."""
    path = stack_path(model)
    return [s for s in sites_of(model) if s.role in roles and (not path or s.path.startswith(f"{path}."))]


def embedding_path(model: nn.Module) -> str:
    """The path of the layer that turns the stack's token ids into vectors.

    Raises:
        BadMethod: the stack does not tell.
    """
    stack = stack_of(model)
    try:
        layer = cast(Any, stack).get_input_embeddings()
    except (AttributeError, NotImplementedError):
        layer = None
    found = next((path for path, module in modules_of(model) if module is layer), None)
    if found is None:
        kind = type(stack).__name__
        raise BadMethod(f"{kind} does not tell its word embeddings (get_input_embeddings), so it can hold no prefix")
    return found


def longest_of(stack: nn.Module) -> int | None:
    """How many places the stack's positions suffice for; None if there is no such limit."""
    config: Any = getattr(stack, "config", None)
    most = None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(most, int) or not most:
        return None
    tables = [module for path, module in modules_of(stack) if "position" in path and isinstance(module, nn.Embedding)]
    unused = [table.padding_idx + 1 for table in tables if table.padding_idx is not None]  # RoBERTa counts from there
    return most - max(unused, default=0)


def inputs_of(module: nn.Module) -> list[str]:
    """The names of the inputs of a module's forward, in order."""
    return list(inspect.signature(type(module).forward).parameters)[1:]

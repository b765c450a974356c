"""Gemma: Llama's module names. A scaled embedding is a layer of its own kind, which has no weight matrix here."""

from dataclasses import replace

from lorakit.core import registry

_LLAMA = registry.find("lorakit.families", "llama").FAMILY
FAMILY = replace(
    _LLAMA,
    model_types=("gemma",),
    given={("use_bidirectional_attention", True): {"bidirectional": True}},
)

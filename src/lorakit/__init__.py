"""lorakit: adapt a frozen pretrained transformer to a task with a few trained numbers."""

from lorakit.core.attach import attach, detach, parameters
from lorakit.core.calibrate import calibrate
from lorakit.core.files import load, save
from lorakit.core.merge import merge, unmerge
from lorakit.core.routing import use
from lorakit.core.summary import summary
from lorakit.errors import LorakitError
from lorakit.methods import (
    IA3,
    AdaLoRA,
    BitFit,
    Bottleneck,
    Combine,
    DoRA,
    DyLoRA,
    DynamicLoRA,
    Full,
    LoKr,
    LoRA,
    PrefixEmbedding,
    PrefixLayer,
    VeRA,
    combine,
)
from lorakit.version import VERSION

__all__ = [
    "IA3",
    "AdaLoRA",
    "BitFit",
    "Bottleneck",
    "Combine",
    "DoRA",
    "DyLoRA",
    "DynamicLoRA",
    "Full",
    "LoKr",
    "LoRA",
    "LorakitError",
    "PrefixEmbedding",
    "PrefixLayer",
    "VeRA",
    "attach",
    "calibrate",
    "combine",
    "detach",
    "load",
    "merge",
    "parameters",
    "save",
    "summary",
    "unmerge",
    "use",
]
__version__ = VERSION

"""One file a method; its class is found by the name of the file."""

from lorakit.methods.adalora import AdaLoRA
from lorakit.methods.bitfit import BitFit
from lorakit.methods.bottleneck import Bottleneck
from lorakit.methods.combine import Combine, combine
from lorakit.methods.dora import DoRA
from lorakit.methods.dylora import DyLoRA
from lorakit.methods.dynamic import DynamicLoRA
from lorakit.methods.full import Full
from lorakit.methods.ia3 import IA3
from lorakit.methods.lokr import LoKr
from lorakit.methods.lora import LoRA
from lorakit.methods.prefix_embedding import PrefixEmbedding
from lorakit.methods.prefix_layer import PrefixLayer
from lorakit.methods.vera import VeRA

DEFAULT = LoRA  # where a user names no method

__all__ = [
    "DEFAULT",
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
    "PrefixEmbedding",
    "PrefixLayer",
    "VeRA",
    "combine",
]

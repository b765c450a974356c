"""Qwen 2, 2.5 and 3: Llama's module names.

Of its own, Qwen 2 has biases on q, k and v, and Qwen 3 norms each head's q and k; those norms have no role.
"""

from dataclasses import replace

from lorakit.core import registry

FAMILY = replace(registry.find("lorakit.families", "llama").FAMILY, model_types=("qwen2", "qwen3"))

"""The names that tensors have in PEFT's files, this year's and older ones."""

from __future__ import annotations

import re

ROOT, PREFIX = "base_model.", "base_model.model."
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # torch.compile, FSDP, checkpointing
_OWN = r"lora_A|lora_B|lora_E|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
_NAMED = re.compile(rf"(.*\.(?:{_OWN}))\.(?!(?:weight|bias)$)[^.]+((?:\.weight|\.bias)?)$")  # with the adapter's name
_MAGNITUDE = ".lora_magnitude_vector"


def bare(key: str) -> str:
    """A tensor's name without what PEFT and others put around a module's path.

    >>> bare("base_model.model.h.0.q.lora_A.default.weight"), bare("module.base_model.model.h.0.q.lora_B.weight")
    ('h.0.q.lora_A.weight', 'h.0.q.lora_B.weight')
    """
    for wrapper in _WRAPPERS:
        key = key.replace(wrapper, "")
    key = key.removeprefix("module.") if key.startswith(f"module.{ROOT}") else key
    key = key.removeprefix(PREFIX) if key.startswith(PREFIX) else key.removeprefix(ROOT)  # so with a prompt
    named = _NAMED.match(key)
    key = f"{named[1]}{named[2]}" if named else key
    return key.removesuffix(".weight") if key.endswith(f"{_MAGNITUDE}.weight") else key


def wrappers(path: str, count: int) -> list[str]:
    """PEFT's names of the wrappers around a module, one for each parameter that is adapted, the innermost first.

    >>> wrappers("experts", 2)
    ['experts.base_layer', 'experts']
    """
    return [path + ".base_layer" * (count - 1 - number) for number in range(count)]


def host(path: str) -> str:
    """The module that PEFT is told to adapt: of one within a wrapper (attention's out_proj), the wrapped one.

    >>> host("h.0.attn.base_layer.out_proj"), host("h.0.q")
    ('h.0.attn', 'h.0.q')
    """
    return path.partition(".base_layer.")[0]

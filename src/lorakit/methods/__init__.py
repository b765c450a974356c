"""One file a method; its class is found by the name of the file."""

from lorakit.methods.lora import LoRA

DEFAULT = LoRA  # where a user names no method

__all__ = ["DEFAULT", "LoRA"]

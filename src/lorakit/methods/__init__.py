"""One file a method; its class is found by the name of the file."""

from lorakit.methods.lora import LoRA

__all__ = ["LoRA"]

"""From and to the files of other tools."""

from lorakit.interop.merged import merge_checkpoint

__all__ = ["merge_checkpoint"]

"""From and to the files of other tools."""

from lorakit.interop.format import Told
from lorakit.interop.merged import merge_checkpoint
from lorakit.interop.merged_gguf import merge_gguf
from lorakit.interop.reading import convert, format_of, read, write

__all__ = ["Told", "convert", "format_of", "merge_checkpoint", "merge_gguf", "read", "write"]

"""Doctests: files of a library that is not installed here are left out."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("triton") else ["lorakit/kernels/triton_*.py"]

"""Reading files without what transformers prints meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(bars: bool = True) -> Iterator[None]:
    """Switch off transformers' notices and, with `bars`, its progress bars; then all is as it was."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    shown = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if bars and shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars and shown:
            logging.enable_progress_bar()

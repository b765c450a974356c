"""One tree of exceptions; every message is one sentence that says what, where, what there is and what to do.

```
LorakitError                 anything a user can mend; the command line prints its sentence and exits with 2
├── NoSuchTarget             a role, group or glob that matches nothing in the model
├── NoSuchAdapter            an adapter name that is not attached
├── UnknownName              a method, initialisation, model or data set that does not exist
├── BadMethod                hyper-parameters that cannot be built on this model
├── BadState                 a call that is not allowed now (merged, in use, attached twice)
├── NotMergeable             a delta that cannot be folded into the weights, and why
├── NeverActed               a trained delta that no forward pass ever called
├── BadRouting               rows or weights that do not fit the batch or the method
├── BadAdapterFile           every fault of an adapter folder, listed
├── NotComparable            matrices that cannot be compared or decomposed (also a ValueError)
├── BadModel                 a model folder or file that cannot be read
├── BadData                  a data file, row or column that cannot be used
│   └── TooShort             a length at which nothing is left to learn from
├── OutputExists             an output folder that holds another run
├── Diverged                 a loss or gradient that is no finite number; says where it began
├── OutOfMemory              a step that does not fit into memory however it is divided
├── MissingPackage           an optional package, and how to install it
└── Interrupted              stopped from outside: by the user, or as another process is gone; says how to resume
```
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class LorakitError(Exception):
    """Anything a user can mend."""


class NoSuchTarget(LorakitError):
    """A role, group or glob that matches nothing in the model."""


class NoSuchAdapter(LorakitError):
    """An adapter name that is not attached."""


class UnknownName(LorakitError):
    """A method, initialisation, model or data set that does not exist."""


class BadMethod(LorakitError):
    """Hyper-parameters that cannot be built on this model."""


class BadState(LorakitError):
    """A call that is not allowed in the model's present state."""


class NotMergeable(LorakitError):
    """A delta that cannot be folded into the weights."""


class NeverActed(LorakitError):
    """A trained delta that no forward pass ever called."""


class BadRouting(LorakitError):
    """Rows or weights that do not fit the batch or the method."""


class BadAdapterFile(LorakitError):
    """Every fault of an adapter folder, listed in `faults`."""

    def __init__(self, where: object, faults: Sequence[str]) -> None:
        self.faults = list(faults)
        shown = "; ".join(self.faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        super().__init__(f"{where} cannot be loaded: {shown}")


class NotComparable(LorakitError, ValueError):
    """Matrices that cannot be compared or decomposed."""


class BadModel(LorakitError):
    """A model folder or file that cannot be read."""


class BadData(LorakitError):
    """A data file, row or column that cannot be used."""


class OutputExists(LorakitError):
    """An output folder that holds another run."""


class Diverged(LorakitError):
    """A loss or gradient that is no finite number."""


class OutOfMemory(LorakitError):
    """A step that does not fit into memory however it is divided."""


class MissingPackage(LorakitError):
    """An optional package that is not installed, and how to install it."""


class Interrupted(LorakitError):
    """Stopped from outside: by the user, or because another process of the run is gone; says how to resume."""


def nearest(name: str, have: Iterable[str]) -> str:
    """Say which names come nearest to `name` and what there is, for the end of a sentence.

    >>> nearest("atn.q", ["attn.q", "attn.v"])
    'did you mean attn.q or attn.v? There is: attn.q, attn.v'
    """
    known = sorted(set(have))
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    listed = ", ".join(known[:24]) + (f" and {len(known) - 24} more" if len(known) > 24 else "")
    return (f"did you mean {' or '.join(close)}? " if close else "") + f"There is: {listed or 'nothing'}"

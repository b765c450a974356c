"""Which examples are held out: decided by their text alone, so that no text stands on both sides."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import TypeVar

T = TypeVar("T")


def fingerprint(text: str) -> bytes:
    """Sixteen bytes that are equal for texts of the same words; case, spaces and punctuation do not count.

    >>> fingerprint("A fine film .") == fingerprint("a  fine film!"), fingerprint("a") == fingerprint("b")
    (True, False)
    """
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())
    return blake2b((" ".join(words) or text).encode(), digest_size=16).digest()


def split(items: Sequence[T], share: float, group: Callable[[T], bytes]) -> tuple[list[T], list[T]]:
    """Hold out a share of the groups: the same ones whatever the order of the items.

    Every group lies wholly on one side. Two groups or more and a share above 0 give a test side with at least one.

    >>> split(["a1", "b1", "a2", "c1"], 0.4, lambda item: item[:1].encode())
    (['b1', 'c1'], ['a1', 'a2'])
    """
    groups = sorted({group(item) for item in items}, key=lambda key: blake2b(key).digest())
    count = max(round(share * len(groups)), 1) if share and len(groups) > 1 else 0
    held = set(groups[: min(count, len(groups) - 1)] if count else [])
    return [item for item in items if group(item) not in held], [item for item in items if group(item) in held]


def apart(train: Sequence[T], test: Sequence[T], group: Callable[[T], bytes]) -> list[T]:
    """The training items of no group that is tested.

    >>> apart(["a1", "b1"], ["a2"], lambda item: item[:1].encode())
    ['b1']
    """
    tested = {group(item) for item in test}
    return [item for item in train if group(item) not in tested]


def sample(items: Sequence[T], count: int, seed: int) -> list[T]:
    """Take `count` items by chance, in their order; a larger count holds every smaller one of the same seed.

    >>> set(sample(range(100), 5, seed=1)) < set(sample(range(100), 6, seed=1))
    True
    """
    chance = sorted(range(len(items)), key=lambda number: blake2b(f"{seed} {number}".encode()).digest())
    return [items[number] for number in sorted(chance[:count])]

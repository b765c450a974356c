"""The built-in data sets: how many rows, which labels, and that training and test share no text."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from lorakit.core.registry import names
from lorakit.data import Data, Dataset, open_data
from lorakit.data.split import fingerprint
from lorakit.errors import BadData

SIZES = {"reviews": 8530, "reviews-imdb": 25_000}


def fingerprints(found: Dataset) -> tuple[set[bytes], set[bytes]]:
    train, test = ({fingerprint(example.context) for example in side} for side in (found.train, found.test))
    return train, test


@pytest.mark.parametrize("name", SIZES)
def test_reviews_are_whole_balanced_and_apart(name: str) -> None:
    found = open_data(name)
    train, test = fingerprints(found)
    assert len(found.train) + len(found.test) == SIZES[name]
    assert len(found.test) >= 1066
    assert not train & test
    assert found.labels == ("negative", "positive")
    for side in (found.train, found.test):
        counts = Counter(example.target for example in side)
        assert set(counts) == {" negative", " positive"}
        assert 0.48 < counts[" positive"] / len(side) < 0.52
        assert all(example.target == f" {found.labels[example.label or 0]}" for example in side)
    assert not any("<br" in example.context for example in found.train)


def test_the_writer_holds_out_the_same_texts_as_the_reader() -> None:
    reviews, writer = open_data("reviews"), open_data("reviews_writer")
    assert [f"Review:{example.target}\nSentiment:" for example in writer.test] == [e.context for e in reviews.test]
    assert [example.context.split()[2] for example in writer.test] == [e.target.strip() for e in reviews.test]


def test_a_built_in_task_can_be_worded_otherwise() -> None:
    found = open_data(Data(source="reviews", template="{text}", train_examples=5, test_examples=5))
    usual = open_data(Data(source="reviews", train_examples=5, test_examples=5))
    assert [f"Review: {example.context}\nSentiment:" for example in found.test] == [e.context for e in usual.test]


def test_e2e_keeps_a_meaning_on_one_side(tmp_path: Path) -> None:
    path = tmp_path / "e2e.csv"
    lines = [f'"name[{n}], area[city]",The {word} place {n}.' for n in range(30) for word in ("first", "second")]
    path.write_text("\n".join(["mr,ref", *lines]))
    found = open_data(Data(source="e2e", path=str(path)))
    train, test = fingerprints(found)
    assert (len(found.train), len(found.test)) == (54, 6)
    assert not train & test
    assert found.train[0].context == "name[0], area[city]\nDescription:"
    assert found.train[0].target == " The first place 0."


def test_e2e_without_its_file_says_what_to_give() -> None:
    with pytest.raises(BadData, match="columns mr and ref"):
        open_data("e2e")


def test_every_file_of_the_folder_is_a_task() -> None:
    assert set(SIZES) | {"e2e", "reviews-writer"} == set(names("lorakit.data.tasks"))

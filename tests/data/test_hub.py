"""Hub data sets, streamed: the same examples as from a file. The hub is played by data in memory."""

from __future__ import annotations

from typing import Any

import pytest

from lorakit.data import Data, open_data
from lorakit.errors import BadData

datasets = pytest.importorskip("datasets")
huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    splits = {
        name: datasets.Dataset.from_dict({"text": [f"{name} {n}" for n in range(6)], "label": kinds}, features)
        for name, kinds in {"train": [0, 1] * 3, "validation": [1] * 6, "test": [-1] * 6}.items()
    }
    streamed = datasets.IterableDatasetDict({name: split.to_iterable_dataset() for name, split in splits.items()})

    def opened(name: str, subset: str | None, *, streaming: bool) -> Any:
        assert (name, subset, streaming) == ("owner/name", "part", True)
        return streamed

    monkeypatch.setattr(huggingface_hub, "dataset_info", lambda name, timeout: None)
    monkeypatch.setattr(datasets, "load_dataset", opened)


def declared(**fields: Any) -> Data:
    return Data(source="owner/name", subset="part", context="text", label="label", **fields)


@pytest.mark.usefixtures("hub")
def test_a_split_is_read_with_the_names_of_its_labels() -> None:
    found = open_data(declared(test="validation"))
    assert found.labels == ("bad", "good")
    assert [example.target for example in found.train] == [" bad", " good"] * 3
    assert [(example.context, example.label) for example in found.test] == [(f"validation {n}", 1) for n in range(6)]


@pytest.mark.usefixtures("hub")
def test_hidden_test_labels_are_no_labels() -> None:
    with pytest.raises(BadData, match="split test, row 1, column 'label': '-1' is no label"):
        open_data(declared())


@pytest.mark.usefixtures("hub")
def test_an_unknown_split_names_the_nearest() -> None:
    with pytest.raises(BadData, match="did you mean validation"):
        open_data(declared(test="validaton"))

"""Data sets of every kind become examples; what cannot be used is named, and no text is on both sides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lorakit.data import Data, Example, open_data
from lorakit.data.split import fingerprint
from lorakit.errors import BadData, UnknownName


def jsonl(path: Path, table: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    return str(path)


def pairs(count: int) -> list[dict[str, str]]:
    return [{"context": f"question {number}", "target": f"answer {number}"} for number in range(count)]


def refused(data: Data, tokenizer: PreTrainedTokenizerFast | None = None) -> str:
    with pytest.raises(BadData) as caught:
        open_data(data, tokenizer)
    return str(caught.value)


def test_every_row_is_in_training_or_test(tmp_path: Path) -> None:
    found = open_data(jsonl(tmp_path / "pairs.jsonl", pairs(50)))
    assert len(found.test) == 5
    expected = {Example(row["context"], " " + row["target"]) for row in pairs(50)}
    assert set(found.train) | set(found.test) == expected
    assert not set(found.train) & set(found.test)


def test_no_text_is_on_both_sides_however_it_is_written(tmp_path: Path) -> None:
    table = [{"context": text, "target": "t"} for n in range(40) for text in (f"Is it {n}?", f"is  it {n} ?")]
    found = open_data(Data(source=jsonl(tmp_path / "twice.jsonl", table), test_share=0.3))
    sides = [{fingerprint(example.context) for example in side} for side in (found.train, found.test)]
    assert len(found.train) + len(found.test) == 80
    assert len(sides[1]) == 12
    assert not sides[0] & sides[1]


def test_the_split_depends_on_the_texts_alone(tmp_path: Path) -> None:
    first = open_data(jsonl(tmp_path / "a.jsonl", pairs(60)))
    again = open_data(Data(source=jsonl(tmp_path / "b.jsonl", pairs(60)[::-1]), seed=9))
    assert set(first.test) == set(again.test)


def test_a_test_file_takes_its_texts_out_of_training_and_says_so(tmp_path: Path) -> None:
    source, test = jsonl(tmp_path / "train.jsonl", pairs(10)), jsonl(tmp_path / "test.jsonl", pairs(3))
    found = open_data(Data(source=source, test=test))
    assert (len(found.train), len(found.test)) == (7, 3)
    assert "3 of 10 training rows are left out" in found.notes[0]
    assert "every training text" in refused(Data(source=test, test=source))


def test_rows_of_a_few_prompts_are_held_out_by_target(tmp_path: Path) -> None:
    table = [
        {"context": f"Write a {kind} poem:", "target": f"{kind} {n}"} for n in range(30) for kind in ("sad", "gay")
    ]
    source = jsonl(tmp_path / "poems.jsonl", table)
    found = open_data(source)
    assert {example.context for example in found.train} == {example.context for example in found.test}
    assert not {example.target for example in found.train} & {example.target for example in found.test}
    assert "2 different contexts" in found.notes[0]
    grouped = open_data(Data(source=source, group="context"))
    assert not {example.context for example in grouped.train} & {example.context for example in grouped.test}


def test_fewer_examples_are_part_of_more(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "pairs.jsonl", pairs(50))
    few, more, other = (
        open_data(Data(source=source, train_examples=count, test_examples=2, seed=seed))
        for count, seed in ((8, 1), (12, 1), (8, 2))
    )
    assert (len(few.train), len(few.test)) == (8, 2)
    assert set(few.train) < set(more.train)
    assert set(few.train) != set(other.train)
    assert few.test == other.test
    assert "45 examples" in refused(Data(source=source, train_examples=46))


def test_a_template_joins_columns(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "facts.jsonl", [{"q": "how many", "who": "", "n": 3.0}])
    found = open_data(Data(source=source, template="{{{q}}} of {who}? ", target="n"))
    assert found.train == [Example("{how many} of ?", " 3")]


@pytest.mark.parametrize("template", ["{q", "{q!r}", "{q:>9}", "{}"])
def test_a_template_with_more_than_columns_is_refused(tmp_path: Path, template: str) -> None:
    source = jsonl(tmp_path / "facts.jsonl", [{"q": "x", "a": "y"}])
    assert "template" in refused(Data(source=source, template=template, target="a"))


@pytest.mark.parametrize(
    ("values", "labels", "names", "numbers"),
    [
        (["no", "yes", "no"], (), ("no", "yes"), [0, 1, 0]),
        ([5, 1, 10], (), ("1", "5", "10"), [1, 0, 2]),
        ([0, 1, 1.0], ("bad", "good"), ("bad", "good"), [0, 1, 1]),
        (["good", "0", "bad"], ("bad", "good"), ("bad", "good"), [1, 0, 0]),
        ([True, False, True], (), ("False", "True"), [1, 0, 1]),
    ],
)
def test_labels_are_names_or_numbers(
    tmp_path: Path, values: list[Any], labels: tuple[str, ...], names: tuple[str, ...], numbers: list[int]
) -> None:
    table = [{"text": f"text {n}", "kind": value} for n, value in enumerate(values)]
    source = jsonl(tmp_path / "kinds.jsonl", table)
    found = open_data(Data(source=source, context="text", label="kind", labels=labels, test_share=0.0))
    assert found.labels == names
    assert [example.label for example in found.train] == numbers
    assert [example.target for example in found.train] == [f" {names[number]}" for number in numbers]


def test_chats_are_rendered_by_the_tokenizer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    source = jsonl(tmp_path / "chats.jsonl", [{"messages": turns}])
    assert open_data(source, tokenizer).train == [Example("<|user|>\nhi<|end|>\n<|assistant|>\n", "hello")]
    assert "chat template" in refused(Data(source=source))


@pytest.mark.parametrize(
    "turns", ["hi", [], [{"role": "user", "content": "hi"}] * 2, [{"role": "assistant", "content": "hi"}], [1, 2]]
)
def test_a_chat_without_an_answer_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, turns: object) -> None:
    source = jsonl(tmp_path / "chats.jsonl", [{"messages": turns}])
    assert "line 1, column 'messages'" in refused(Data(source=source), tokenizer)


def test_every_bad_row_is_reported_with_line_and_column(tmp_path: Path) -> None:
    table = [*pairs(2), {"context": "c"}, {"context": "c", "target": ["t"]}, {"context": None, "target": "t"}]
    said = refused(Data(source=jsonl(tmp_path / "bad.jsonl", [*table, {"context": "c", "target": " "}, [], *pairs(2)])))
    for line, fault in ((3, "'target': is missing"), (4, "'target': holds a list"), (5, "'context': has no value")):
        assert f"line {line}, column {fault}" in said
    assert "line 6, column 'target': is empty" in said
    assert "line 7 holds list" in said


def test_bytes_that_are_not_utf8_are_reported_where_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "latin.csv"
    path.write_bytes(b"context,target\na,b\nc,caf\xe9\n")
    assert "line 3, column 'target': is not UTF-8" in refused(Data(source=str(path)))


@pytest.mark.parametrize(("content", "says"), [("", "is empty"), ("context,target\n", "is empty")])
def test_an_empty_file_is_refused(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "none.csv"
    path.write_text(content)
    assert says in refused(Data(source=str(path)))


def test_an_unknown_column_names_the_nearest(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "facts.jsonl", [{"question": "x", "answer": "y"}])
    assert "no target column" in refused(Data(source=source))
    assert "answer, question" in refused(Data(source=source))
    said = refused(Data(source=source, template="{qestion}", target="anser"))
    assert "no column 'qestion': did you mean question?" in said
    assert "no column 'anser': did you mean answer?" in said
    assert "context or template" in refused(Data(source=source, label="answer"))


def test_a_label_that_is_none_of_those_given_is_refused(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "kinds.jsonl", [{"text": "a", "kind": "god"}, {"text": "b", "kind": -1}])
    said = refused(Data(source=source, context="text", label="kind", labels=("bad", "good")))
    assert "line 1, column 'kind': 'god' is no label; did you mean good?" in said
    assert "line 2, column 'kind': '-1' is no label" in said
    one = jsonl(tmp_path / "one.jsonl", [{"text": "a", "kind": "x"}])
    assert "only the label 'x'" in refused(Data(source=one, context="text", label="kind"))


def test_values_that_contradict_each_other_are_all_named() -> None:
    with pytest.raises(BadData) as caught:
        Data(source="x", context="a", template="{b}", train_examples=0, test_share=1.5)
    for fault in ("not both", "train_examples=0", "test_share=1.5"):
        assert fault in str(caught.value)
    assert "no use for path and subset" in refused(Data(source="x.csv", path="a", subset="b"))
    assert "no use for test" in refused(Data(source="reviews", test="a.csv"))


def test_an_unknown_data_set_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean reviews"):
        open_data("reveiws")
    with pytest.raises(UnknownName, match="cannot be reached"):
        open_data("nobody/nothing")

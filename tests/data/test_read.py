"""Files come out row by row, whole, and a bad row with its place."""

from __future__ import annotations

import csv
import json
import tracemalloc
from pathlib import Path

import pytest

from lorakit.data import rows
from lorakit.errors import BadData

TABLE = [
    {"q": "a,b", "a": 'say "hi"'},
    {"q": "two\nlines", "a": "tab\there"},
    {"q": "é ☃", "a": ""},
    {"q": "NA", "a": "null"},
]


def write(path: Path, table: list[dict[str, str]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(table), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(table)
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_what_was_written_is_read(tmp_path: Path, kind: str) -> None:
    read = list(rows(write(tmp_path / f"table.{kind}", TABLE)))
    assert [row.cells for row in read] == TABLE
    assert not any(row.fault for row in read)


def test_places_count_the_lines_of_cells_with_line_breaks(tmp_path: Path) -> None:
    path = write(tmp_path / "table.csv", TABLE)
    assert [row.place for row in rows(path)] == [f"{path}, line {number}" for number in (2, 3, 5, 6)]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"long.{kind}", [{"q": f"{number} " * 20, "a": "x"} for number in range(20_000)])
    tracemalloc.start()
    count = sum(1 for _ in rows(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak < path.stat().st_size / 5


def test_a_bad_row_comes_out_in_its_place_and_the_rest_with_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "1"}\n{"a": 2,\n\n[3]\n{"a": "4"}\n' + "[" * 5000 + "\n" + '{"a": 1' + "0" * 5000 + "}\n")
    read = list(rows(path))
    assert [bool(row.fault) for row in read] == [False, True, True, False, True, True]
    assert read[1].place.endswith("line 2")
    assert "character 9" in read[1].fault
    assert read[2].place.endswith("line 4")


@pytest.mark.parametrize(("line", "fault"), [("1", "ends before column 'b'"), ("1,2,3", "after column 'b'")])
def test_a_line_of_another_length_names_the_column(tmp_path: Path, line: str, fault: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(f"a,b\n1,2\n{line}\n3,4\n")
    good, bad, last = rows(path)
    assert fault in bad.fault
    assert bad.place == f"{path}, line 3"
    assert (good.cells, last.cells) == ({"a": "1", "b": "2"}, {"a": "3", "b": "4"})


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("open.csv", b'a,b\n1,2\n3,"4\n5,6\n', "line 3"),
        ("twice.csv", b"a,a\n1,2\n", "'a'"),
        ("latin.csv", b"caf\xe9,b\n1,2\n", "UTF-8"),
        ("broken.parquet", b"PAR1 not", "Parquet"),
        ("table.xlsx", b"", ".csv, .jsonl"),
    ],
)
def test_a_file_that_is_broken_says_where(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadData, match=name) as caught:
        list(rows(path))
    assert says in str(caught.value)


def test_an_absent_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").touch()
    with pytest.raises(BadData, match=r"did you mean pairs\.csv"):
        rows(tmp_path / "pair.csv")
    with pytest.raises(BadData, match="is a folder"):
        rows(tmp_path)


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    (tmp_path / "long.csv").write_text(f"text\n{'a' * 200_000}\n")
    (row,) = rows(tmp_path / "long.csv")
    assert len(row.cells["text"]) == 200_000

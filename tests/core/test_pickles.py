from __future__ import annotations

import argparse
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.core.pickles import read_pickle
from lorakit.errors import BadAdapterFile


class Caller:
    """A pickle of it calls `print`, as a hostile one would call something worse."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


def test_tensors_come_back_with_their_bits_names_and_order(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 2).half(), "a": torch.nn.Parameter(torch.randn(2)), "t": torch.randn(2, 3).T}
    torch.save(OrderedDict(tensors), tmp_path / "a.pt")
    read = read_pickle(tmp_path / "a.pt")
    assert list(read) == list(tensors)
    for name, value in read.items():
        assert (value.shape, value.dtype) == (tensors[name].shape, tensors[name].dtype)
        assert torch.equal(value.read(), tensors[name]) and value.read().is_contiguous()


def test_what_is_read_is_not_the_file_s_memory(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    value = read_pickle(tmp_path / "a.pt")["a"]
    value.read().zero_()
    assert value.read().tolist() == [1, 1]


def test_the_layout_before_zip_files_is_read_too(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(3)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert read_pickle(tmp_path / "old.bin")["a"].read().tolist() == [0, 1, 2]


def test_tensors_may_lie_one_level_down(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": {"a": torch.ones(1)}}, tmp_path / "a.pt")
    assert list(read_pickle(tmp_path / "a.pt", ["model_state_dict", "state_dict"])) == ["a"]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("thing", "name"), [(Caller(), "print"), (argparse.Namespace(a=1), "argparse.Namespace")])
def test_what_is_no_tensor_is_named_and_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], thing: object, name: str, zipped: bool
) -> None:
    torch.save({"a": torch.ones(1), "x": thing}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(BadAdapterFile, match=f"wants to call .*{name}, which is no tensor"):
        read_pickle(tmp_path / "a.pt")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_torch_did_not_write_is_named_and_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], protocol: int
) -> None:
    (tmp_path / "a.bin").write_bytes(pickle.dumps({"x": Caller()}, protocol=protocol))
    with pytest.raises(BadAdapterFile, match=r"wants to call .*print, which is no tensor"):
        read_pickle(tmp_path / "a.bin")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"a": torch.ones(2), "n": 3}, "n is a int, not a tensor"),
        ({1: torch.ones(2)}, "names a tensor 1"),
        ([torch.ones(2)], "holds a list"),
        (torch.ones(2), "holds a Tensor"),
        ({"s": torch.eye(2).to_sparse()}, "s is a tensor without plain values"),
        ({"m": torch.empty(2, device="meta")}, "m is a tensor without plain values"),
    ],
)
def test_all_else_but_plain_tensors_by_name_is_refused(tmp_path: Path, content: object, reason: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(BadAdapterFile, match=reason):
        read_pickle(tmp_path / "a.pt")


@pytest.mark.parametrize("bytes_", [b"", b"no pickle at all", b"PK\x03\x04 cut short"])
def test_a_damaged_file_is_one_sentence(tmp_path: Path, bytes_: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(bytes_)
    with pytest.raises(BadAdapterFile, match=r"a\.pt cannot be loaded: it is damaged"):
        read_pickle(tmp_path / "a.pt")


def test_a_file_that_is_cut_short_is_damaged(tmp_path: Path) -> None:
    torch.save({"a": torch.randn(64)}, tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadAdapterFile, match="damaged"):
        read_pickle(tmp_path / "a.pt")


def test_no_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadAdapterFile, match="no such file"):
        read_pickle(tmp_path / "a.pt")

"""`huggingface_hub` itself talks to a hub in memory: what is pushed is pulled, byte for byte, or nothing is."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

import lorakit as lk
from lorakit.cli import main
from lorakit.cli.push import BESIDE
from lorakit.core.files import PICKLE, TENSORS
from lorakit.errors import BadAdapterFile, LorakitError, OutputExists
from lorakit.interop.hub import CARD, pack, pull, push
from tests.interop.hub_stand_in import OWNER, READER, WRITER, Hub, serving
from tests.tiny import tiny

REPO = f"{OWNER}/reviews"
SENT = {"adapter_config.json", TENSORS, "run.json", "results.json", "metrics.jsonl", "loss.png"}
Change = Callable[[Path], object]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that this process's client asks, as somebody who may write to the repositories of `OWNER`."""
    with serving() as found:
        settings = {
            "ENDPOINT": found.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": found.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "no-token"),
            "AGENT_HARNESSES_PATH": str(tmp_path / "agents"),
            **{"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_PROGRESS_BARS": True},
        }
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value, raising=False)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        yield found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, with what stays at home: checkpoints, and what resumes from them."""
    folder = tmp_path_factory.mktemp("trained") / "reviews"
    model = tiny("llama")
    model.config._name_or_path = "owner/base"
    lk.attach(model, lk.LoRA(rank=2), name="a")
    lk.save(model, "a", folder)
    run = {"base": "owner/base", "out": "reviews", "data": {"source": "reviews"}}
    (folder / "run.json").write_text(json.dumps({"run": run, "versions": {"torch": "2"}}))
    (folder / "results.json").write_text('{"base": {"accuracy": 0.5}, "adapter": {"accuracy": 0.75}}')
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (folder / "loss.png").write_bytes(b"\x89PNG")
    (folder / "training.json").write_text("{}")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step-1.safetensors").write_bytes(b"state")
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "reviews"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def asked(hub: Hub) -> list[str]:
    return [request for request in hub.requests if "agent-harnesses" not in request]


def sentence(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What a command that fails says: one line, and exit code 2."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lorakit: ")]
    assert len(said) == 1
    return said[0]


def test_what_is_pushed_is_pulled_byte_for_byte(hub: Hub, folder: Path, tmp_path: Path) -> None:
    before = contents(folder)
    parcel = pack(folder, REPO, BESIDE)
    sent = push(parcel)
    out = tmp_path / "new" / "pulled"
    found = pull(REPO, out, BESIDE)
    assert contents(folder) == before
    assert contents(out) == {name: before[name] for name in SENT} | {CARD: parcel.card.encode()}
    assert (found.commit, found.base, set(found.files)) == (sent.commit, "owner/base", SENT | {CARD})
    assert hub.repos[REPO].messages[1:] == [f"Adapter of owner/base (lorakit {lk.__version__})"]
    assert len(hub.large) == 2
    assert lk.load(tiny("llama"), out) == "pulled"


def test_the_verbs_say_what_lies_where_and_what_comes_next(
    hub: Hub, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pulled"
    assert main(["push", str(folder), REPO, "--private", "--message", "first", "--license", "mit"]) == 0
    said = capsys.readouterr().out
    commit = hub.repos[REPO].branches["main"]
    assert all(name in said for name in SENT | {CARD, commit, f"pull {REPO} --out reviews"})
    assert (hub.repos[REPO].private, hub.repos[REPO].messages[-1]) == (True, "first")
    assert b"license: mit" in hub.repos[REPO].files[CARD]
    assert main(["pull", REPO, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert all(text in said for text in (commit, "owner/base", f"generate {out}"))
    assert contents(out) == {name: value for name, value in hub.repos[REPO].files.items() if name != ".gitattributes"}


def test_a_dry_run_shows_files_and_card_and_asks_nobody(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(folder), REPO, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert pack(folder, REPO, BESIDE).card in said
    assert all(name in said for name in SENT)
    assert asked(hub) == []


def test_paths_of_this_machine_stay_here(hub: Hub, folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(tmp_path)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    data = {"source": str(tmp_path / "rows.csv"), "test": str(tmp_path / "more.csv")}
    run = {"base": str(tmp_path), "out": str(folder), "data": data}
    (folder / "run.json").write_text(json.dumps({"run": run}))
    with pytest.raises(LorakitError, match="give its name at the hub with --base"):
        pack(folder, REPO, BESIDE)
    assert main(["push", str(folder), REPO, "--base", "gpt2"]) == 0
    files = hub.repos[REPO].files
    assert not any(str(tmp_path).encode() in content for content in files.values())
    assert json.loads(files["adapter_config.json"]) == config | {"base_model_name_or_path": "gpt2"}
    told = json.loads(files["run.json"])["run"]
    assert told == {"base": "gpt2", "out": "reviews", "data": {"source": "rows.csv", "test": "more.csv"}}
    assert b"base_model: gpt2" in files[CARD]


def test_a_card_that_people_wrote_is_kept_unless_told_otherwise(hub: Hub, folder: Path) -> None:
    theirs = b"# By hand\n"
    (folder / CARD).write_bytes(theirs)
    push(pack(folder, REPO, BESIDE))
    assert hub.repos[REPO].files[CARD] == theirs
    push(pack(folder, REPO, BESIDE, overwrite=True))
    assert b"# reviews" in hub.repos[REPO].files[CARD]
    assert (folder / CARD).read_bytes() == theirs


def test_a_card_that_was_edited_at_the_hub_is_kept_unless_told_otherwise(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push(pack(folder, REPO, BESIDE))
    (folder / "results.json").write_text('{"adapter": {"accuracy": 0.875}}')
    push(pack(folder, REPO, BESIDE))
    repo = hub.repos[REPO]
    assert b"0.875" in repo.files[CARD]
    edited = repo.files[CARD] + b"\nAnd more.\n"
    repo.commit("main", repo.files | {CARD: edited}, "by hand")
    (folder / "results.json").write_text('{"adapter": {"accuracy": 0.625}}')
    assert main(["push", str(folder), REPO]) == 0
    assert "was edited and is kept" in capsys.readouterr().out
    assert repo.files[CARD] == edited
    assert b"0.625" in repo.files["results.json"]
    assert main(["push", str(folder), REPO, "--card", "overwrite"]) == 0
    assert b"0.625" in repo.files[CARD]


def test_a_branch_is_made_and_main_is_left_alone(hub: Hub, folder: Path, tmp_path: Path) -> None:
    push(pack(folder, REPO, BESIDE), revision="second")
    repo = hub.repos[REPO]
    assert set(repo.files) == {".gitattributes"}
    assert pull(REPO, tmp_path / "b", BESIDE, revision="second").commit == repo.branches["second"]
    push(pack(folder, REPO, BESIDE), revision="second")
    with pytest.raises(BadAdapterFile, match=r"it holds no adapter_model.safetensors; there is: .gitattributes"):
        pull(REPO, tmp_path / "m", BESIDE)


def test_a_public_repository_does_not_take_what_should_be_private(hub: Hub, folder: Path) -> None:
    repo = hub.add(REPO, {})
    with pytest.raises(LorakitError, match="exists and is public"):
        push(pack(folder, REPO, BESIDE), private=True)
    assert repo.messages == ["initial commit"]


BROKEN: dict[str, tuple[Change, str]] = {
    "damaged": (lambda it: (it / TENSORS).write_bytes(b"x" * 40), "it is damaged"),
    "no config": (lambda it: (it / "adapter_config.json").unlink(), "with adapter_config.json only"),
    "no folder": (shutil.rmtree, "there is no such folder"),
    "run": (lambda it: (it / "run.json").write_text("{"), "its run.json is damaged"),
    "results": (lambda it: (it / "results.json").write_text("[]"), "it is no JSON object"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_adapter_is_never_sent(case: str, hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, words = BROKEN[case]
    change(folder)
    assert words in sentence(capsys, "push", folder, REPO)
    assert asked(hub) == []


@pytest.mark.parametrize(
    ("token", "repo", "words"),
    [
        ("", REPO, "takes adapters only from those it knows; log in with `hf auth login`, or set HF_TOKEN"),
        ("hf_nobody", REPO, "does not know your token"),
        (READER, REPO, "your token may not do this to owner/reviews (You don't have the rights"),
        (WRITER, "other/reviews", "your token may not do this to other/reviews"),
        ("hf_broken\x0btoken", REPO, "your token has characters that none can have"),
        ("hf_brøken", REPO, "your token has characters that none can have"),
        (WRITER, "reviews", "write owner/reviews"),
        (WRITER, "https://huggingface.co/owner/reviews", "is no name of a repository"),
    ],
)
def test_who_may_not_push_reads_why_and_never_the_token(
    token: str, repo: str, words: str, hub: Hub, folder: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", token)
    said = sentence(capsys, "push", folder, repo)
    assert words in said
    assert not token or repr(token)[1:-1] not in said
    assert hub.repos == {}


def test_a_card_that_the_hub_refuses_is_named(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / CARD).write_text("---\na: [\n---\n")
    assert "answered 400 for owner/reviews: it is no YAML" in sentence(capsys, "push", folder, REPO)
    assert hub.repos[REPO].messages == ["initial commit"]


def test_what_cannot_be_found_is_named(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    hub.add(REPO, {"config.json": b"{}"}, private=True)
    hub.add("other/deep", {"a/adapter_model.safetensors": b"", "b/c/adapter_model.bin": b""})
    assert "has no repository owner/none that you may read" in sentence(capsys, "pull", "owner/none", "--out", out)
    assert "has no revision 'v2'" in sentence(capsys, "pull", REPO, "--out", out, "--revision", "v2")
    assert "it holds no adapter_model.safetensors; there is: config.json" in sentence(
        capsys, "pull", REPO, "--out", out
    )
    assert "in its folders a, b/c: name one with --subfolder" in sentence(capsys, "pull", "other/deep", "--out", out)
    assert "its folder d holds no" in sentence(capsys, "pull", "other/deep", "--out", out, "--subfolder", "d")
    assert list(tmp_path.iterdir()) == []


def test_a_private_repository_is_nobody_elses(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(pack(folder, REPO, BESIDE), private=True)
    for token in (READER, ""):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(LorakitError, match="that you may read; for a private one, log in"):
            pull(REPO, tmp_path / "out", BESIDE)


def test_a_gated_repository_says_where_to_ask(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(pack(folder, REPO, BESIDE))
    hub.repos[REPO].gated = True
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(LorakitError, match=f"is gated: ask for access at {hub.endpoint}/{REPO}"):
        pull(REPO, tmp_path / "place" / "out", BESIDE)
    assert list((tmp_path / "place").iterdir()) == []


def test_an_adapter_in_a_subfolder_is_pulled_without_its_neighbours(hub: Hub, folder: Path, tmp_path: Path) -> None:
    own = {name: content for name, content in contents(folder).items() if name in SENT}
    hub.add(REPO, {f"a/b/{name}": content for name, content in own.items()} | {"a/code.py": b"", CARD: b""})
    pull(REPO, tmp_path / "out", BESIDE, subfolder="a/b/")
    assert contents(tmp_path / "out") == own


@pytest.mark.parametrize("bad", [b"not tensors", pickle.dumps(print)])
@pytest.mark.parametrize("name", [TENSORS, PICKLE])
def test_an_adapter_that_is_not_sound_leaves_nothing(name: str, bad: bytes, hub: Hub, tmp_path: Path) -> None:
    hub.add(REPO, {"adapter_config.json": b'{"peft_type": "LORA"}', name: bad})
    (tmp_path / "place").mkdir()
    with pytest.raises(BadAdapterFile, match=f"^{REPO} cannot be loaded"):
        pull(REPO, tmp_path / "place" / "out", BESIDE)
    assert list((tmp_path / "place").iterdir()) == []


def test_a_folder_that_is_there_is_not_touched(hub: Hub, folder: Path) -> None:
    before = contents(folder)
    with pytest.raises(OutputExists, match="name a new folder"):
        pull(REPO, folder, BESIDE)
    assert contents(folder) == before
    assert asked(hub) == []


def test_a_download_that_breaks_off_leaves_nothing_and_can_be_repeated(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    push(pack(folder, REPO, BESIDE))
    hub.breaks = TENSORS
    out = tmp_path / "place" / "out"
    with pytest.raises(LorakitError, match=f"cannot be exchanged with {hub.endpoint}"):
        pull(REPO, out, BESIDE)
    assert list(out.parent.iterdir()) == []
    hub.breaks = ""
    pull(REPO, out, BESIDE)
    assert (out / TENSORS).read_bytes() == (folder / TENSORS).read_bytes()


def test_an_upload_that_breaks_off_commits_nothing(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.breaks = "upload"
    with pytest.raises(LorakitError, match=f"cannot be exchanged with {hub.endpoint}"):
        push(pack(folder, REPO, BESIDE))
    assert set(hub.repos[REPO].files) == {".gitattributes"}


def test_without_a_network_one_sentence_says_so(
    hub: Hub, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for words in (("push", folder, REPO), ("pull", REPO, "--out", tmp_path / "out")):
        assert "owner/reviews cannot be exchanged with http://127.0.0.1:9" in sentence(capsys, *words)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for words in (("push", folder, REPO), ("pull", REPO, "--out", tmp_path / "out")):
        assert "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set" in sentence(capsys, *words)
    assert asked(hub) == []


@pytest.mark.slow
def test_endpoint_and_token_come_from_the_environment(folder: Path, tmp_path: Path) -> None:
    with serving() as hub:
        settings = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": WRITER, "HF_HOME": str(tmp_path / "home")}
        offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), "0")
        environment = {**os.environ, **settings, **offline, "HF_HUB_DISABLE_XET": "1"}
        code = "import sys; from lorakit.cli import main; sys.exit(main(sys.argv[1:4]) or main(sys.argv[4:]))"
        words = ["push", str(folder), REPO, "pull", REPO, f"--out={tmp_path / 'out'}"]
        done = subprocess.run([sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True)
        assert (done.returncode, WRITER in done.stdout + done.stderr) == (0, False), done.stderr
        assert {TENSORS, CARD} <= set(hub.repos[REPO].files)
    assert lk.load(tiny("llama"), tmp_path / "out") == "out"


def test_plain_tensors_in_a_pickle_are_pulled_where_there_are_no_others(hub: Hub, folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / TENSORS)
    torch.save(tensors, tmp_path / "plain")
    config = (folder / "adapter_config.json").read_bytes()
    files = {"adapter_config.json": config, PICKLE: (tmp_path / "plain").read_bytes()}
    hub.add(REPO, files)
    pull(REPO, tmp_path / "out", BESIDE)
    assert contents(tmp_path / "out") == files
    hub.add(REPO, files | {TENSORS: (folder / TENSORS).read_bytes()})
    assert PICKLE not in pull(REPO, tmp_path / "both", BESIDE).files
    with pytest.raises(BadAdapterFile, match=r"with adapter_model\.safetensors only; convert it first"):
        pack(tmp_path / "out", REPO, BESIDE)

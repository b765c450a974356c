"""Adapters to and from the Hugging Face hub, or a server with its HTTP API (HF_ENDPOINT).

Token, endpoint, cache and proxies are those of `huggingface_hub`: what `hf auth login` or HF_TOKEN gave it, is used.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from lorakit.core import files
from lorakit.core.atomic import new_folder
from lorakit.errors import BadAdapterFile, LorakitError, OutputExists
from lorakit.interop import card
from lorakit.interop.asking import LOGIN, asking
from lorakit.version import VERSION

CARD = "README.md"


@dataclass(frozen=True)
class Beside:
    """The names of the files that a run leaves beside its adapter, and that travel with it."""

    run: str
    results: str
    metrics: str
    curve: str


@dataclass(frozen=True)
class Parcel:
    """What is going to be one commit."""

    repo: str
    base: str
    files: Mapping[str, Path | bytes]  # by name: a file as it is, or what is sent in its place
    owns_card: bool  # whether the card was written here, and yields to one that people wrote in the repository

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {
            name: len(what) if isinstance(what, bytes) else what.stat().st_size for name, what in self.files.items()
        }

    @property
    def card(self) -> str:
        """The model card."""
        what = self.files[CARD]
        return what.decode() if isinstance(what, bytes) else _text(what)


@dataclass(frozen=True)
class Sent:
    """A commit that holds an adapter."""

    commit: str
    url: str
    kept_card: bool  # whether the repository's own card was left as it is


@dataclass(frozen=True)
class Pulled:
    """An adapter that was brought here."""

    commit: str
    base: str | None
    task: str | None
    files: tuple[str, ...]


def pack(
    folder: Path,
    repo: str,
    beside: Beside,
    *,
    base: str | None = None,
    license: str | None = None,
    overwrite: bool = False,
) -> Parcel:
    """Put together what `push` sends; nothing is written, and no network is asked.

    Paths of this machine stay here: run.json tells the names of files and folders only, and the base has a name that
    means the same elsewhere.

    Args:
        folder: of the adapter, which has to be sound.
        repo: owner/name.
        beside: what else is sent where it is there; checkpoints never are.
        base: the base's name at the hub; None: the one that the adapter names.
        license: for the card.
        overwrite: write the card anew where people wrote one.

    Raises:
        BadAdapterFile: all that is wrong with the adapter.
        LorakitError: `repo` is no owner/name; the base has no name that means something elsewhere.

    Example:
        >>> import lorakit as lk, tempfile
        >>> from transformers import GPT2Config, GPT2Model
        >>> model = GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=10))
        >>> lk.attach(model, lk.LoRA(rank=2), name="a")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lk.save(model, "a", folder + "/a")
        ...     parcel = pack(Path(folder) / "a", "owner/a", Beside("run", "results", "metrics", "curve"), base="gpt2")
        >>> sorted(parcel.files)
        ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
    """
    _check(repo)
    contents = files.read(folder)
    if absent := [each for each in (files.CONFIG, files.TENSORS) if not (folder / each).is_file()]:
        raise BadAdapterFile(folder, [f"the hub takes it with {each} only; convert it first" for each in absent])
    name = card.base_name(base or contents.config.get("base_model_name_or_path"), folder)
    config = contents.config | {"base_model_name_or_path": name}
    found: dict[str, Path | bytes] = {each: folder / each for each in _names(beside) if (folder / each).is_file()}
    run, results = _json(folder / beside.run), _json(folder / beside.results)
    told = card.Told(
        repo=repo, base=name, contents=contents, run=card.shared(run, name), results=results,
        curve=beside.curve if beside.curve in found else None, license=license,
    )  # fmt: skip
    found |= _changed(files.CONFIG, contents.config, config) | _changed(beside.run, run, told.run)
    owns_card = overwrite or CARD not in found or card.is_unedited(_text(folder / CARD))
    found |= {CARD: card.write(told).encode()} if owns_card else {}
    return Parcel(repo, name, found, owns_card and not overwrite)


def push(
    parcel: Parcel, *, private: bool = False, revision: str | None = None, message: str | None = None, api: Any = None
) -> Sent:
    """Send an adapter as one commit; a repository or a branch that is not there is made.

    Args:
        parcel: what `pack` put together.
        private: make the repository private.
        revision: the branch; None: main.
        message: of the commit.
        api: a `huggingface_hub.HfApi`; None: one as the environment tells.

    Raises:
        UnknownName: no such owner or repository that may be read.
        LorakitError: no token, or one without the right; a public repository that should be private; no network.
    """
    from huggingface_hub import CommitOperationAdd, get_token

    api = api or _api()
    if not (api.token or get_token()):
        raise LorakitError(f"{api.endpoint} takes adapters only from those it knows; {LOGIN}")
    with asking(api, parcel.repo, revision):
        there = _made(api, parcel.repo, private=private, revision=revision)
        kept = parcel.owns_card and CARD in there and not _is_ours(api, parcel.repo, revision)
        added = [CommitOperationAdd(name, what) for name, what in parcel.files.items() if not (kept and name == CARD)]
        text = message or f"Adapter of {parcel.base} (lorakit {VERSION})"
        done = api.create_commit(parcel.repo, added, commit_message=text, revision=revision)
    return Sent(done.oid, f"{api.endpoint}/{parcel.repo}", kept)


def pull(
    repo: str, out: Path, beside: Beside, *, revision: str | None = None, subfolder: str = "", api: Any = None
) -> Pulled:
    """Bring an adapter here: `out` appears whole and sound, or not at all; no other file is downloaded.

    Args:
        repo: owner/name.
        out: a folder that does not exist yet.
        beside: what else is brought where it is there.
        revision: a branch, tag or commit; None: main.
        subfolder: where in the repository the adapter lies.
        api: a `huggingface_hub.HfApi`; None: one as the environment tells.

    Raises:
        OutputExists: `out` is there already.
        UnknownName: no such repository that may be read, or no such revision of it.
        BadAdapterFile: it holds no adapter, or one that is not sound.
        LorakitError: the hub cannot be reached, or refuses.
    """
    _check(repo)
    if os.path.lexists(out):
        raise OutputExists(f"{out} exists already; name a new folder for the adapter")
    api, within = api or _api(), f"{subfolder.strip('/')}/".lstrip("/")
    with asking(api, repo, revision):
        info = api.model_info(repo, revision=revision)
    names = _chosen(repo, within, [each.rfilename for each in info.siblings], beside)
    with new_folder(out) as temporary:
        for name in names:
            with asking(api, repo, revision):
                cached = api.hf_hub_download(repo, within + name, revision=info.sha)
            shutil.copyfile(cached, temporary / name)
        try:
            config = files.read(temporary).config
        except BadAdapterFile as error:
            raise BadAdapterFile(repo, error.faults) from error
    return Pulled(info.sha, config.get("base_model_name_or_path"), config.get("task_type"), tuple(names))


def _names(beside: Beside) -> tuple[str, ...]:
    return (files.CONFIG, files.TENSORS, CARD, *astuple(beside))


def _chosen(repo: str, within: str, there: list[str], beside: Beside) -> list[str]:
    """The adapter's files in a folder of the repository; tensors as a pickle only where there are no others."""
    own = [name.removeprefix(within) for name in there if name.startswith(within)]
    found = [name for name in _names(beside) if name in own]
    if files.TENSORS in found:
        return found
    if files.PICKLE in own:
        return [*found, files.PICKLE]
    inner = sorted(
        {str(Path(name).parent) for name in there if Path(name).name in (files.TENSORS, files.PICKLE)} - {"."}
    )
    more = f"; adapters lie in its folders {', '.join(inner)}: name one with --subfolder" if inner else ""
    place = f"its folder {within.rstrip('/')}" if within else "it"
    raise BadAdapterFile(repo, [f"{place} holds no {files.TENSORS}{more or f'; there is: {_few(there)}'}"])


def _few(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"


def _changed(name: str, was: Mapping[str, Any], is_: Mapping[str, Any]) -> dict[str, bytes]:
    """The JSON file that is sent in place of one here, if it says something else."""
    return {} if was == is_ else {name: (json.dumps(is_, indent=2) + "\n").encode()}


def _json(path: Path) -> dict[str, Any]:
    """What a run's file says; nothing where there is none."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadAdapterFile(path.parent, [f"its {path.name} is damaged ({error}); remove it"]) from error
    if not isinstance(found, dict):
        raise BadAdapterFile(path.parent, [f"its {path.name} is damaged (it is no JSON object); remove it"])
    return found


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "replace")


def _check(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise LorakitError(f"{repo!r} is no name of a repository: {str(error).rstrip('.')}") from error
    if "/" not in repo:
        raise LorakitError(f"{repo!r} is no name of a repository; write owner/{repo}")


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(library_name="lorakit", library_version=VERSION)


def _made(api: Any, repo: str, *, private: bool, revision: str | None) -> set[str]:
    """Make the repository and the branch where there are none; the names of the files that are there."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repo)
    except RepositoryNotFoundError:
        api.create_repo(repo, private=private or None)
    else:
        if private and not info.private:
            raise LorakitError(f"{repo} exists and is public; make it private in its settings, or leave --private out")
    if revision:
        api.create_branch(repo, branch=revision, exist_ok=True)
    return {each.rfilename for each in api.model_info(repo, revision=revision).siblings}


def _is_ours(api: Any, repo: str, revision: str | None) -> bool:
    """Whether the repository's card is as lorakit wrote it."""
    return card.is_unedited(_text(Path(api.hf_hub_download(repo, CARD, revision=revision))))

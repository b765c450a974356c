"""The laws about the code itself: imports point down, names stay home, files stay small, importing stays light."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import lorakit
from lorakit.core.delta import Delta
from lorakit.core.method import Method, method_names
from tests.source import (
    PACKAGE,
    ROOT,
    body_lines,
    functions,
    identifiers,
    imports,
    module_name,
    package_files,
    parameters,
    strings,
)

# Each part may import the parts of the lines above its own, and itself; parts of one line never meet.
LAYERS = (
    ("errors", "version"),
    ("kernels",),
    ("core",),
    ("methods", "inits", "families", "data", "models"),
    ("train", "evaluate", "analyse", "serve", "interop"),
    ("reproduce",),
    ("cli",),
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
ROOT_IMPORTS = ("errors", "version", "core", "methods")  # what `lorakit/__init__` may re-export from
FOUND_BY_NAME = ("lorakit.methods", "lorakit.inits", "lorakit.families")  # the registry's, for whoever asks it
HEAVY = (
    *("triton", "tensorboard", "mlflow", "wandb", "trackio", "ray"),
    *("transformers", "datasets", "pyarrow", "pandas", "gguf", "peft", "trl", "accelerate"),
    *("plotly", "jinja2", "huggingface_hub"),
    *("matplotlib", "rich", "jsonargparse", "fastapi", "starlette", "uvicorn"),
)
EVERY_FILE = [pytest.param(path, id=module_name(path)) for path in package_files()]
DEFAULT = "lorakit.methods.DEFAULT"  # where a user names no method
METHOD_FILES = sorted(path for path in (PACKAGE / "methods").glob("*.py") if path.stem != "__init__")


def part_of(module: str) -> str:
    """The part of the package that a dotted name belongs to; "" is the package itself and its public names.

    >>> part_of("lorakit.core.registry"), part_of("lorakit.attach"), part_of("lorakit"), part_of("lorakit.__main__")
    ('core', '', '', 'cli')
    """
    part = ([*module.split("."), ""])[1]
    if part == "__main__":
        return "cli"
    return part if (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").exists() else ""


def allowed(importer: str, imported: str) -> bool:
    """Whether a file of part `importer` may import from part `imported`.

    >>> allowed("train", "core"), allowed("train", "evaluate"), allowed("core", "data"), allowed("core", "")
    (True, False, False, False)
    """
    if not importer:
        return imported in ROOT_IMPORTS
    if not imported:
        return LEVEL[importer] >= LEVEL["reproduce"]
    return importer == imported or LEVEL[imported] < LEVEL[importer]


@pytest.mark.parametrize("path", EVERY_FILE)
def test_imports_point_down(path: Path) -> None:
    importer = part_of(module_name(path))
    assert not importer or importer in LEVEL, f"{importer} has no place in LAYERS"
    ours = [(line, name) for line, name in imports(path) if name.split(".")[0] == "lorakit"]
    wrong = [f"line {line}: {name}" for line, name in ours if not allowed(importer, part_of(name))]
    assert not wrong, f"{importer or 'lorakit'} may not import these: {wrong}"


@pytest.mark.parametrize("path", EVERY_FILE)
def test_a_module_named_in_a_string_obeys_the_same_arrows(path: Path) -> None:
    importer = part_of(module_name(path))
    named = [(line, text) for line, text in strings(path) if re.fullmatch(r"lorakit(\.\w+)+", text)]
    wrong = [n for n in named if n[1] not in FOUND_BY_NAME and not allowed(importer, part_of(n[1]))]
    assert not wrong, f"{importer} reaches these by name: {wrong}"


@pytest.mark.parametrize("path", EVERY_FILE)
def test_a_methods_name_stands_in_its_own_file_only(path: Path) -> None:
    part = part_of(module_name(path))
    if part in ("methods", ""):
        return
    classes = _method_classes()
    names = {kind.__name__ for kind, _ in method_names().values()}
    names |= set() if part == "cli" else set(method_names())  # a verb's default is a name
    found = [entry for entry in identifiers(path) if entry[1] in classes]
    found += [(line, text) for line, text in strings(path) if text.replace("_", "-") in names]
    found += [entry for entry in imports(path) if entry[1].startswith("lorakit.methods.") and entry[1] != DEFAULT]
    assert not found, f"{module_name(path)} names a method: {found}; the registry finds methods"


@cache
def _method_classes() -> set[str]:
    """Names of the methods and deltas that the method files define."""
    modules = [importlib.import_module(module_name(file)) for file in METHOD_FILES]
    kinds = [kind for module in modules for kind in vars(module).values() if isinstance(kind, type)]
    return {kind.__name__ for kind in kinds if issubclass(kind, Method | Delta) and "methods" in kind.__module__}


@pytest.mark.parametrize("path", EVERY_FILE)
def test_files_functions_and_signatures_stay_small(path: Path) -> None:
    length = len(path.read_text(encoding="utf-8").splitlines())
    assert length <= 400, f"{length} lines"
    long = [f"{f.name} has {body_lines(f)} lines" for f in functions(path) if body_lines(f) > 50]
    wide = [f"{f.name} has {len(parameters(f))} parameters" for f in functions(path) if len(parameters(f)) > 7]
    assert not long + wide


def test_public_names_are_sorted_few_and_documented() -> None:
    names = list(lorakit.__all__)
    assert names == sorted(names, key=lambda name: (not name.isupper(), name))  # as ruff sorts them
    assert len(names) <= 30
    public = [name for name in names if not name.startswith("__")]
    assert [name for name in public if not (getattr(lorakit, name).__doc__ or "").strip()] == []
    reference = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    unlisted = [name for name in public if not re.search(rf"\blorakit\.{name}\b", reference)]
    assert not unlisted, f"add these to docs/reference.md: {unlisted}"


def test_importing_the_package_is_light() -> None:
    code = "import sys, torch; before = set(sys.modules); import lorakit; print(*sorted(set(sys.modules) - before))"
    gained = _python(code).split()
    assert "lorakit.core" in gained
    assert [name for name in gained if name.split(".")[0] in HEAVY] == []


def test_the_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()


def test_the_changelog_knows_the_version() -> None:
    assert lorakit.__version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_no_text_names_a_place_on_one_machine() -> None:
    places = [f"/{folder}/" for folder in ("root", "work", "home", "Users", "tmp")]
    found = [f"{path}: {place}" for path in _repository_files() for place in places if place in _text(path)]
    assert not found


def _python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    return run.stdout


def _repository_files() -> list[Path]:
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""

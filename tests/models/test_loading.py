"""Models by name: the right class with the file's weights; what is not there is named."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from lorakit.core import registry
from lorakit.errors import BadModel, MissingPackage, UnknownName
from lorakit.models import load
from lorakit.models.package import Packaged
from tests.tiny import tiny


@pytest.fixture(scope="module")
def tokenizer_folder() -> Path:
    return registry.find("lorakit.models.packaged", "minilm-l6").model.path()


def saved(model: PreTrainedModel, folder: Path, tokenizer_folder: Path) -> str:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "roberta"])
def test_a_folder_loads_as_it_was_saved(tmp_path: Path, tokenizer_folder: Path, family: str) -> None:
    model = tiny(family)
    loaded, tokenizer = load(saved(model, tmp_path, tokenizer_folder))
    assert type(loaded) is type(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert not loaded.training
    assert tokenizer.padding_side == "right"


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_fresh_head_is_seeded_and_leaves_the_chance_of_others_alone(
    tmp_path: Path, tokenizer_folder: Path, family: str
) -> None:
    base = tiny(family)
    folder = saved(base, tmp_path, tokenizer_folder)
    state = torch.get_rng_state()
    first, again, other = (load(folder, labels=3, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    differing = {name for name, value in first.state_dict().items() if not torch.equal(value, other.state_dict()[name])}
    assert differing
    assert not any(name.startswith(f"{first.base_model_prefix}.") for name in differing)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert first.config.num_labels == 3
    assert first.config.pad_token_id is not None


def test_weights_have_the_type_asked_for(tmp_path: Path, tokenizer_folder: Path) -> None:
    loaded, _ = load(saved(tiny("llama"), tmp_path, tokenizer_folder), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_a_missing_padding_token_is_the_end_of_text(tmp_path: Path) -> None:
    words = Tokenizer(WordLevel({"a": 0, "<end>": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(tmp_path)
    tiny("llama", pad_token_id=None).save_pretrained(tmp_path)
    model, tokenizer = load(str(tmp_path))
    assert tokenizer.pad_token == "<end>"
    assert model.config.pad_token_id == tokenizer.pad_token_id == 1


@pytest.mark.parametrize("labels", [None, 2])
def test_weights_that_are_not_in_the_files_are_named(
    tmp_path: Path, tokenizer_folder: Path, labels: int | None
) -> None:
    folder = saved(tiny("llama"), tmp_path, tokenizer_folder)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadModel, match=r"do not hold model\.layers\.1\.self_attn\.q_proj\.weight"):
        load(folder, labels=labels)


def test_a_truncated_file_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = saved(tiny("llama"), tmp_path, tokenizer_folder)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BadModel, match="cannot be loaded"):
        load(folder)


def test_code_in_the_folder_is_not_run(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = saved(tiny("llama"), tmp_path, tokenizer_folder)
    config = json.loads((tmp_path / "config.json").read_text())
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": auto}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(BadModel):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_a_model_of_a_package_is_called_by_its_name() -> None:
    model, tokenizer = load("minilm_l6")
    assert model.config.hidden_size == 384
    assert model.name_or_path == tokenizer.name_or_path == "minilm_l6"
    vectors = model(**tokenizer(["a fine film", "a good movie", "tax law"], return_tensors="pt", padding=True))
    first, near, far = vectors.last_hidden_state[:, 0]
    assert torch.cosine_similarity(first, near, 0) > torch.cosine_similarity(first, far, 0)


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = ModuleType("absent")
    absent.model = Packaged(package="no_such_package", files="x", install="pip install no-such-package")  # type: ignore[attr-defined]
    monkeypatch.setattr(registry, "find", lambda package, name: absent)
    with pytest.raises(MissingPackage, match="pip install no-such-package"):
        load("minilm-l6")


@pytest.mark.parametrize("name", ["smolm2-135m", "nobody/nothing"])
def test_an_unknown_name_says_what_there_is(name: str) -> None:
    with pytest.raises(UnknownName, match="smollm2-135m"):
        load(name)


def test_what_is_no_model_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "model-a").mkdir()
    with pytest.raises(UnknownName, match="did you mean model-a"):
        load(str(tmp_path / "model-b"))
    with pytest.raises(BadModel, match=r"no config\.json"):
        load(str(tmp_path))
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(BadModel, match="holds an adapter"):
        load(str(tmp_path))
    with pytest.raises(BadModel, match="is a file"):
        load(str(tmp_path / "adapter_config.json"))
    with pytest.raises(BadModel, match="two labels"):
        load("minilm-l6", labels=1)

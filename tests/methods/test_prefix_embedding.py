"""Prefix-embedding tuning against the plain model called with embeddings, and against PEFT's prompt tuning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import lorakit as lk
from lorakit.core.insertion import contexts
from lorakit.core.state import adapter_tensors
from lorakit.errors import BadAdapterFile, BadMethod
from lorakit.methods.prefix_embedding import PrefixEmbedding
from tests.laws.cases import close, scramble
from tests.tiny import tiny, tokens

# Hu et al. 2021, table 15: prefix and infix, and what 96 blocks of width 12,288 make of them
GPT3_ROWS = ((32, 0, 393_216), (64, 8, 884_736), (128, 8, 1_671_168), (256, 8, 3_244_032), (512, 8, 6_389_760))
DECODERS = ("gpt2", "llama", "qwen3", "gemma", "opt", "gpt_neox")


def vectors(model: torch.nn.Module) -> Tensor:
    (found,) = adapter_tensors(model, "a").values()
    return found


def words(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """The base's word embeddings of token ids (N,), scaled where the model scales them."""
    layer = model.get_input_embeddings()
    return type(layer).forward(layer, ids)


@torch.no_grad()
@pytest.mark.parametrize("family", DECODERS)
def test_it_is_the_model_called_with_the_embeddings(family: str) -> None:
    model = tiny(family)
    lk.attach(model, PrefixEmbedding(prefix=3, infix=2), name="a")
    scramble(model, "a")
    ids_BT, end, own_ND = tokens(model), 4, vectors(model)
    with contexts(model, torch.tensor([end])):
        logits = model(ids_BT).logits
    prefix, infix = (own.expand(3, -1, -1) for own in (own_ND[:3], own_ND[3:]))
    token_BTD = words(model, ids_BT)
    longer = torch.cat([prefix, token_BTD[:, :end], infix, token_BTD[:, end:]], 1)
    with lk.use(model, None):
        expected = model(inputs_embeds=longer).logits
    predicting = torch.tensor([3, 4, 5, 8, 9, 10, 11])  # what follows token 3 is the infix at places 7 and 8
    assert close(logits, expected[:, predicting])


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_an_encoders_first_token_stays_first(family: str) -> None:
    model = tiny(family)
    lk.attach(model, PrefixEmbedding(prefix=3, infix=2), name="a")
    ids_BT, own_ND = tokens(model), vectors(model)
    hidden = model(ids_BT).last_hidden_state
    prefix, infix = (own.expand(3, -1, -1) for own in (own_ND[:3], own_ND[3:]))
    token_BTD = words(model, ids_BT)
    longer = torch.cat([token_BTD[:, :1], prefix, token_BTD[:, 1:], infix], 1)
    with lk.use(model, None):
        expected = model(inputs_embeds=longer)
    assert close(hidden, expected.last_hidden_state[:, [0, 4, 5, 6, 7, 8, 9]])
    assert close(model(ids_BT).pooler_output, expected.pooler_output)


@torch.no_grad()
@pytest.mark.parametrize("family", DECODERS)
def test_a_prefix_alone_is_peft_prompt_tuning_and_its_file_is_read(family: str, tmp_path: Path) -> None:
    theirs = get_peft_model(tiny(family), PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")).eval()
    theirs.prompt_encoder["default"].embedding.weight.mul_(0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    model = tiny(family)
    lk.load(model, tmp_path / "theirs", name="a")
    assert torch.equal(vectors(model), theirs.prompt_encoder["default"].embedding.weight)
    expected = theirs(tokens(model)).logits[:, 5:]
    assert close(model(tokens(model)).logits, expected)
    lk.save(model, "a", tmp_path / "ours")
    again = tiny(family)
    lk.load(again, tmp_path / "ours", name="a")
    assert torch.equal(again(tokens(model)).logits, model(tokens(model)).logits)


def test_prompts_of_peft_that_mean_something_else_are_refused(tmp_path: Path) -> None:
    config = PromptTuningConfig(num_virtual_tokens=5, task_type="SEQ_CLS")
    get_peft_model(tiny("bert", labels=2), config).save_pretrained(tmp_path / "bert")
    with pytest.raises(BadAdapterFile, match="first token"):
        lk.load(tiny("bert", labels=2), tmp_path / "bert")
    config = PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    get_peft_model(tiny("gpt2"), config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(BadAdapterFile, match=r"prompt_embeddings has shape \(5, 32\).*\(5, 16\)"):
        lk.load(tiny("gpt2", hidden_size=16), tmp_path / "gpt2")
    path = tmp_path / "gpt2" / "adapter_config.json"
    told = path.read_text()
    for wrong in ('"num_virtual_tokens": 6', '"num_virtual_tokens": 0', '"num_virtual_tokens": "5"'):
        path.write_text(told.replace('"num_virtual_tokens": 5', wrong))
        with pytest.raises(BadAdapterFile):
            lk.load(tiny("gpt2"), tmp_path / "gpt2")


@torch.no_grad()
@pytest.mark.parametrize("family", DECODERS)
def test_peft_reads_a_prefix_alone(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    lk.attach(model, PrefixEmbedding(prefix=5), name="a")
    scramble(model, "a")
    lk.save(model, "a", tmp_path / "a")
    theirs = PeftModel.from_pretrained(tiny(family), tmp_path / "a").eval()
    ids_BT, mask_BT = tokens(model), torch.ones(3, 7, dtype=torch.long)
    mask_BT[0, -2:] = 0  # on the right
    expected = model(ids_BT, attention_mask=mask_BT).logits
    assert close(theirs(ids_BT, attention_mask=mask_BT).logits[:, 5:], expected)
    labels_BT = ids_BT.clone()
    labels_BT[:, 0] = -100  # PEFT's loss counts the first token, too, which only the prefix predicts
    assert close(theirs(ids_BT, labels=labels_BT).loss, model(ids_BT, labels=labels_BT).loss)
    again = tiny(family)
    lk.load(again, tmp_path / "a", name="a")
    assert torch.equal(vectors(again), vectors(model))


@torch.no_grad()
def test_peft_reads_a_prefix_with_a_classifier(tmp_path: Path) -> None:
    model = tiny("llama", labels=3)
    lk.attach(model, PrefixEmbedding(prefix=5, train="score"), name="a")
    scramble(model, "a")
    lk.save(model, "a", tmp_path / "a")
    theirs = PeftModel.from_pretrained(tiny("llama", labels=3), tmp_path / "a").eval()
    assert close(_last_logits(theirs, tokens(model), theirs.base_model.model), model(tokens(model)).logits)
    again = tiny("llama", labels=3)
    lk.load(again, tmp_path / "a", name="a")
    assert torch.equal(again(tokens(model)).logits, model(tokens(model)).logits)


@pytest.mark.parametrize(
    ("family", "labels", "fields"),
    [
        ("gpt2", None, dict(infix=2)),
        ("gpt2", None, dict(train="ln_f")),
        ("gpt2", 3, {}),  # PEFT wants the classifier's head in the file
        ("bert", None, {}),
        ("bert", 3, dict(train="classifier")),
        ("t5", None, {}),
    ],
)
def test_what_peft_has_not_keeps_our_type(family: str, labels: int | None, fields: dict, tmp_path: Path) -> None:
    model = tiny(family, labels=labels)
    lk.attach(model, PrefixEmbedding(prefix=3, **fields), name="a")
    lk.save(model, "a", tmp_path / "a")
    with pytest.raises(KeyError, match="PREFIX_EMBEDDING"):
        PeftModel.from_pretrained(tiny(family, labels=labels), tmp_path / "a")
    again = tiny(family, labels=labels)
    lk.load(again, tmp_path / "a", name="a")
    before = adapter_tensors(model, "a")
    assert all(torch.equal(value, before[name]) for name, value in adapter_tensors(again, "a").items())


@torch.no_grad()
@pytest.mark.parametrize("family", DECODERS)
def test_it_begins_as_word_embeddings(family: str) -> None:
    model = tiny(family)
    torch.manual_seed(0)
    lk.attach(model, PrefixEmbedding(prefix=4), name="a")
    torch.manual_seed(0)
    drawn = torch.randint(model.config.vocab_size, (1, 4))
    assert torch.equal(vectors(model), words(model, drawn)[0])
    scramble(model, "a", std=1.0)
    torch.manual_seed(0)
    lk.attach(model.train(), PrefixEmbedding(prefix=4), name="b")  # the prefix in force changes no start
    assert model.training
    (second,) = adapter_tensors(model, "b").values()
    assert torch.equal(second, words(model, drawn)[0])


@torch.no_grad()
def test_a_classifier_of_peft_comes_over_with_its_head(tmp_path: Path) -> None:
    config = PromptTuningConfig(num_virtual_tokens=5, task_type="SEQ_CLS")
    theirs = get_peft_model(tiny("gpt2", labels=3), config).eval()
    theirs.base_model.score.modules_to_save["default"].weight.mul_(2)
    theirs.save_pretrained(tmp_path / "theirs")
    model = tiny("gpt2", labels=3)
    lk.load(model, tmp_path / "theirs", name="a")
    assert close(model(tokens(model)).logits, _last_logits(theirs, tokens(model), theirs.base_model.transformer))


def _last_logits(theirs: PeftModel, ids_BT: Tensor, stack: torch.nn.Module) -> Tensor:
    """PEFT's classifier at the last token (transformers' own choice fails for embeddings with padding set)."""
    given = torch.cat([theirs.get_prompt(len(ids_BT)), theirs.word_embeddings(ids_BT)], 1)
    return theirs.base_model.score(stack(inputs_embeds=given)[0])[:, -1]


@pytest.mark.parametrize("fields", [dict(prefix=0), dict(prefix=-1), dict(infix=-2), dict(prefix=2.5), dict(infix="8")])
def test_lengths_are_checked_where_they_are_written(fields: dict) -> None:
    with pytest.raises(BadMethod, match=r"prefix|infix"):
        PrefixEmbedding(**fields)


@pytest.mark.parametrize(("prefix", "infix", "parameters"), GPT3_ROWS)
def test_counts_are_those_published_for_gpt3(prefix: int, infix: int, parameters: int) -> None:
    config = GPT2Config(n_layer=96, n_embd=12288, n_head=96, n_positions=2048)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
        lk.attach(model, PrefixEmbedding(prefix=prefix, infix=infix))
    assert lk.summary(model).trainable_parameters == parameters == 12288 * (prefix + infix)

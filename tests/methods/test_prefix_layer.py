"""Prefix-layer tuning against a hand-written loop over the blocks, and its keys and values against PEFT's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

import lorakit as lk
from lorakit.core.insertion import contexts
from lorakit.core.state import adapter_tensors
from lorakit.errors import BadAdapterFile, BadMethod
from lorakit.methods.combine import Combine
from lorakit.methods.prefix_embedding import PrefixEmbedding
from lorakit.methods.prefix_layer import PrefixLayer
from tests.laws.cases import close, scramble
from tests.tiny import tiny, tokens

GPT3_ROWS = ((2, 2), (8, 0), (8, 8), (32, 4), (64, 0))  # of table 15; its own counts follow from no formula


def attached(family: str, **fields: object) -> PreTrainedModel:
    model = tiny(family)
    lk.attach(model, PrefixLayer(**fields), name="a")
    scramble(model, "a")
    return model


@torch.no_grad()
@pytest.mark.parametrize("with_words", [False, True])
def test_it_is_a_loop_that_overwrites_hidden_states(with_words: bool) -> None:
    words, layers = PrefixEmbedding(prefix=3, infix=2), PrefixLayer(prefix=3, infix=2)
    model = tiny("gpt2")
    lk.attach(model, Combine(parts=(layers, words)) if with_words else layers, name="a")
    scramble(model, "a")
    ids_BT, end, own = tokens(model), 4, _own(model)
    with contexts(model, torch.tensor([end])):
        logits = model(ids_BT).logits
    places = torch.tensor([0, 1, 2, 7, 8])
    rest = torch.tensor([3, 4, 5, 6, 9, 10, 11])
    with lk.use(model, None):
        stack = model.transformer
        hidden = torch.zeros(3, 12, 32)
        hidden[:, rest] = stack.wte(ids_BT)
        hidden[:, places] = own["wte"] if with_words else stack.wte.weight[1]  # 0 is the padding
        hidden = hidden + stack.wpe(torch.arange(12))
        first, last = stack.h
        hidden = first(hidden)
        hidden[:, places] = own["h.0"]
        hidden = stack.ln_f(last(hidden))
        expected = model.lm_head(hidden)
    assert close(logits, expected[:, [3, 4, 5, 8, 9, 10, 11]])


def _own(model: PreTrainedModel) -> dict[str, Tensor]:
    """The vectors by the path of their layer in the stack."""
    tensors = adapter_tensors(model, "a")
    return {name.removeprefix("transformer.").rsplit(".", 2)[0]: value for name, value in tensors.items()}


@torch.no_grad()
def test_keys_and_values_are_peft_prefix_tuning() -> None:
    config = PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM", prefix_projection=False)
    theirs = get_peft_model(tiny("gpt2"), config).eval()
    model = attached("gpt2", prefix=5, form="key-value")
    theirs.prompt_encoder["default"].embedding.weight.copy_(_in_peft_order(model))
    ids_BT, mask_BT = tokens(model), torch.ones(3, 7, dtype=torch.long)
    assert close(model(ids_BT, attention_mask=mask_BT).logits, theirs(ids_BT, attention_mask=mask_BT).logits)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "opt"])
@pytest.mark.parametrize("projected", [False, True])
def test_peft_files_of_keys_and_values_go_both_ways(family: str, projected: bool, tmp_path: Path) -> None:
    config = PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM", prefix_projection=projected)
    theirs = get_peft_model(tiny(family), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = tiny(family)
    lk.load(model, tmp_path / "theirs", name="a")
    ids_BT, mask_BT = tokens(model), torch.ones(3, 7, dtype=torch.long)
    mask_BT[0, :2], mask_BT[1, -2:] = 0, 0
    labels_BT = ids_BT.masked_fill(mask_BT == 0, -100)
    labels_BT[0, 2] = -100  # padding would predict it
    expected = model(ids_BT, attention_mask=mask_BT, labels=labels_BT)
    given = theirs(ids_BT, attention_mask=mask_BT, labels=labels_BT)
    assert close(given.logits[mask_BT.bool()], expected.logits[mask_BT.bool()])
    assert close(given.loss, expected.loss)
    lk.save(model, "a", tmp_path / "ours")
    back = PeftModel.from_pretrained(tiny(family), tmp_path / "ours").eval()
    assert torch.equal(back(ids_BT, attention_mask=mask_BT).logits, given.logits)
    again = tiny(family)
    lk.load(again, tmp_path / "ours", name="a")
    assert torch.equal(again(ids_BT, attention_mask=mask_BT).logits, expected.logits)


@torch.no_grad()
def test_peft_reads_keys_and_values_with_a_classifier(tmp_path: Path) -> None:
    model = tiny("gpt2", labels=3)
    lk.attach(model, PrefixLayer(prefix=3, form="key-value", train="score"), name="a")
    scramble(model, "a")
    lk.save(model, "a", tmp_path / "a")
    theirs = PeftModel.from_pretrained(tiny("gpt2", labels=3), tmp_path / "a").eval()
    again = tiny("gpt2", labels=3)
    lk.load(again, tmp_path / "a", name="a")
    for other in (theirs, again):
        assert close(other(tokens(model)).logits, model(tokens(model)).logits)


@pytest.mark.parametrize(
    ("family", "fields"),
    [("llama", {}), ("gptj", {}), ("bert", {}), ("gpt2", dict(infix=1)), ("gpt2", dict(form="hidden"))],
)
def test_what_peft_has_not_keeps_our_type(family: str, fields: dict, tmp_path: Path) -> None:
    model = attached(family, **(dict(prefix=3, form="key-value") | fields))
    lk.save(model, "a", tmp_path / "a")
    with pytest.raises(KeyError, match="PREFIX_LAYER"):
        PeftModel.from_pretrained(tiny(family), tmp_path / "a")
    again = tiny(family)
    lk.load(again, tmp_path / "a", name="a")
    before = adapter_tensors(model, "a")
    assert all(torch.equal(value, before[name]) for name, value in adapter_tensors(again, "a").items())


@pytest.mark.parametrize(("family", "words"), [("llama", "may rotate or norm"), ("bert", "before its first token")])
def test_peft_files_that_mean_something_else_are_refused(family: str, words: str, tmp_path: Path) -> None:
    labels, task = (2, "SEQ_CLS") if family == "bert" else (None, "CAUSAL_LM")
    config = PrefixTuningConfig(num_virtual_tokens=5, task_type=task)
    get_peft_model(tiny(family, labels=labels), config).save_pretrained(tmp_path / "a")
    with pytest.raises(BadAdapterFile, match=words):
        lk.load(tiny(family, labels=labels), tmp_path / "a")


def test_a_peft_file_that_does_not_fit_is_a_named_fault(tmp_path: Path) -> None:
    config = PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    get_peft_model(tiny("gpt2"), config).save_pretrained(tmp_path)
    with pytest.raises(BadAdapterFile, match=r"prompt_embeddings has shape \(5, 128\), the model needs \(5, 192\)"):
        lk.load(tiny("gpt2", num_hidden_layers=3), tmp_path)
    path = tmp_path / "adapter_config.json"
    told = path.read_text()
    for number, words in (("6", r"needs \(6, 128\)"), ("0", "prefix"), ('"5"', "num_virtual_tokens"), ("64", "fewer")):
        path.write_text(told.replace('"num_virtual_tokens": 5', f'"num_virtual_tokens": {number}'))
        with pytest.raises(BadAdapterFile, match=words):
            lk.load(tiny("gpt2"), tmp_path)
    path.write_text(told)
    save_file({"other": torch.zeros(5, 128)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(BadAdapterFile, match="prompt_embeddings is missing"):
        lk.load(tiny("gpt2"), tmp_path)


def _in_peft_order(model: PreTrainedModel) -> Tensor:
    """(tokens, 2 layers width): for each token keys, then values, layer by layer."""
    own = adapter_tensors(model, "a")
    names = [f"transformer.h.{layer}.attn.c_attn.attn_{part}.vectors" for layer in (0, 1) for part in "kv"]
    return torch.cat([own[name] for name in names], 1)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "gpt_neox"])
def test_keys_and_values_are_those_that_the_attention_reads(family: str) -> None:
    model = attached(family, prefix=3, infix=1, form="key-value")
    before = model(tokens(model))[0]
    for name, value in adapter_tensors(model, "a").items():
        changed = value.clone()
        value.mul_(-1)
        assert not close(model(tokens(model))[0], before), name
        value.copy_(changed)
    grouped = model.config.num_key_value_heads if family == "llama" else 4
    assert {value.shape for value in adapter_tensors(model, "a").values()} == {(4, grouped * 8)}


def test_the_targets_first_token_depends_on_the_context_where_there_is_an_infix() -> None:
    model = attached("gpt2", prefix=2, infix=2)
    logits = model(tokens(model)).logits[:, -1]
    assert not close(logits[0], logits[1], 0.1)
    logits.pow(2).mean().backward()
    own = adapter_tensors(model, "a")
    assert own["transformer.h.0.block.vectors"].grad[2:].abs().min() > 0
    assert torch.equal(own["transformer.h.1.block.unread"].grad, torch.zeros(4, 32))


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "t5"])
def test_it_begins_as_what_the_model_makes_of_tokens(family: str) -> None:
    model = tiny(family)
    torch.manual_seed(0)
    drawn = torch.randint(model.config.vocab_size, (1, 4))
    stack = model.encoder if family == "t5" else model
    hidden = stack(drawn, output_hidden_states=True).hidden_states
    lk.attach(model.train(), PrefixLayer(prefix=3), name="other")
    scramble(model, "other", std=1.0)  # in force, and without influence on the start
    torch.manual_seed(0)
    lk.attach(model, PrefixLayer(prefix=4), name="a")
    first, *_ = adapter_tensors(model, "a").values()
    assert close(first, hidden[1][0])
    assert model.training


@torch.no_grad()
def test_keys_begin_as_those_of_tokens() -> None:
    model = tiny("gpt2")
    torch.manual_seed(0)
    lk.attach(model, PrefixLayer(prefix=4, form="key-value"), name="a")
    torch.manual_seed(0)
    drawn, block = torch.randint(64, (1, 4)), model.transformer.h[0]
    with lk.use(model, None):
        entering = model(drawn, output_hidden_states=True).hidden_states[0]
        keys = block.attn.c_attn(block.ln_1(entering))[0, :, 32:64]
    assert close(adapter_tensors(model, "a")["transformer.h.0.attn.c_attn.attn_k.vectors"], keys)


@pytest.mark.parametrize("parts", ["prefix-embedding,prefix-layer", "prefix-layer,lora,prefix-embedding"])
def test_every_vector_that_is_read_learns(parts: str) -> None:
    model = tiny("llama")
    lk.attach(model, Combine(parts=parts), name="a")
    scramble(model, "a")
    model(tokens(model)).logits.pow(2).mean().backward()
    moved = {name: bool(value.grad.any()) for name, value in adapter_tensors(model, "a").items()}
    (unread,) = (name for name, learns in moved.items() if not learns)
    assert unread.startswith("model.layers.1.block")
    assert unread.endswith("unread")


@pytest.mark.parametrize(
    ("family", "words"), [("deberta-v2", "relative positions"), ("vit", "no blocks that read token ids")]
)
def test_models_that_cannot_hold_it_are_left_alone(family: str, words: str) -> None:
    model = tiny(family)
    attributes = set(vars(model))
    with pytest.raises(BadMethod, match=words):
        lk.attach(model, PrefixLayer(form="key-value"))
    assert set(vars(model)) == attributes
    with pytest.raises(BadMethod, match="one block"):
        lk.attach(tiny("gpt2", num_hidden_layers=1), PrefixLayer())


def test_fields_are_checked_where_they_are_written() -> None:
    with pytest.raises(BadMethod, match="hidden"):
        PrefixLayer(form="keys")
    with pytest.raises(BadMethod, match="prefix"):
        PrefixLayer(prefix=0, infix=0)


@pytest.mark.parametrize(("prefix", "infix"), GPT3_ROWS)
def test_counts_are_those_of_the_formulas(prefix: int, infix: int) -> None:
    config = GPT2Config(n_layer=96, n_embd=12288, n_head=96, n_positions=2048)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
        lk.attach(model, PrefixLayer(prefix=prefix, infix=infix), name="hidden")
        lk.attach(model, PrefixLayer(prefix=prefix, infix=infix, form="key-value"), name="key-value")
    hidden, keys_values = (adapter.trainable for adapter in lk.summary(model).adapters)
    assert hidden == 96 * 12288 * (prefix + infix)
    assert keys_values == 2 * hidden
    assert (prefix, infix) != (8, 8) or hidden == 18_874_368

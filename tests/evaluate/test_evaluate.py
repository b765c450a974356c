from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

import lorakit as lk
from lorakit import evaluate
from lorakit.data.examples import Example
from lorakit.errors import BadData, BadModel
from lorakit.evaluate import scores
from tests.tiny import tiny

LETTERS = " abcdefghijklmnopqrstuvwxyz"
CONTEXTS = ["a fine film", "so", "worse than the last one", "bad bad bad", "never mind"]
DECODERS = ["llama", "gpt2"]


def tokenizer() -> Any:
    """One token a letter; 0 pads, 1 begins, 2 ends."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {letter: 4 + n for n, letter in enumerate(LETTERS)}
    made = Tokenizer(WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def adapted(family: str, **fields: Any) -> Any:
    """A tiny model with an adapter away from zero, which is in force."""
    model = tiny(family, **fields)
    lk.attach(model, lk.LoRA(rank=2, targets=("attention",), train=("classifier",) if fields else ()), name="a")
    torch.manual_seed(0)
    for parameter in lk.parameters(model):
        torch.nn.init.normal_(parameter, std=0.5)
    return model


@torch.no_grad()
def log_probability(model: Any, context: str, target: str, end: tuple[int, ...] = ()) -> list[float]:
    """Of each token of the target, one text at a time from whole logits."""
    read = tokenizer()
    ids = torch.tensor([[*read(context + target)["input_ids"], *end]])
    logs = model(input_ids=ids).logits[0].double().log_softmax(-1)
    return [logs[place - 1, ids[0, place]].item() for place in range(len(context), ids.shape[1])]


def examples(labels: list[str]) -> list[Example]:
    return [Example(text, labels[number % 2], number % 2) for number, text in enumerate(CONTEXTS)]


@pytest.mark.parametrize("labels", [["a", "b"], [" good", " bad"], [" no", " not bad", " nothing", "x"]])
@pytest.mark.parametrize("family", DECODERS)
def test_a_labels_score_is_the_log_probability_of_the_whole_label(
    family: str, labels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "_CHUNK_ROWS", 3)
    model = adapted(family)
    wanted = torch.tensor([[sum(log_probability(model, text, label)) for label in labels] for text in CONTEXTS])
    for batch_size in (1, 2, 32):
        found = evaluate.label_scores(model, tokenizer(), CONTEXTS, labels, batch_size=batch_size)
        torch.testing.assert_close(found, wanted.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("labels", "rows"), [(["a", "b", "c"], 5), ([" no", " not"], 5), ([" no", " yes"], 10)])
def test_labels_share_a_forward_where_one_input_begins_the_other(labels: list[str], rows: int) -> None:
    model = adapted("llama")
    read: list[int] = []
    model.model.register_forward_pre_hook(lambda m, args, kw: read.append(len(kw["input_ids"])), with_kwargs=True)
    evaluate.label_scores(model, tokenizer(), CONTEXTS, labels)
    assert sum(read) == rows


@pytest.mark.parametrize("family", DECODERS)
def test_logits_are_made_at_the_wanted_columns_only(family: str) -> None:
    model = adapted(family)
    widths: list[int] = []
    model.lm_head.register_forward_hook(lambda m, args, logits: widths.append(logits.shape[1]))
    evaluate.label_scores(model, tokenizer(), CONTEXTS, ["a", "b"], batch_size=1)
    assert widths == [1] * len(CONTEXTS)


def test_label_accuracy_counts_the_likeliest_words() -> None:
    model = adapted("llama")
    labels = [" good", " bad"]
    likeliest = [max((0, 1), key=lambda n, t=text: sum(log_probability(model, t, labels[n]))) for text in CONTEXTS]
    wanted = sum(number % 2 == choice for number, choice in enumerate(likeliest)) / len(CONTEXTS)
    for words in (labels, ["good", "bad"]):
        assert evaluate.label_accuracy(model, tokenizer(), examples(labels), words) == wanted


def test_examples_that_are_not_labelled_with_the_words_are_refused() -> None:
    model = adapted("llama")
    with pytest.raises(BadData, match="number of one of the 2 words"):
        evaluate.label_accuracy(model, tokenizer(), [Example("a", " good")], ["good", "bad"])
    with pytest.raises(BadData, match="' fine', which is not the label's word ' good'"):
        evaluate.label_accuracy(model, tokenizer(), [Example("a", " fine", 0)], ["good", "bad"])
    with pytest.raises(BadData, match="label column"):
        evaluate.classification_accuracy(tiny("bert", labels=2), tokenizer(), [Example("a", "")])


@pytest.mark.parametrize("family", DECODERS)
def test_perplexity_is_that_of_the_target_tokens(family: str) -> None:
    model, shown = adapted(family), examples([" good enough", " bad"])
    logs = [value for e in shown for value in log_probability(model, e.context, e.target, end=(2,))]
    found = evaluate.perplexity(model, tokenizer(), shown, batch_size=2)
    assert found == pytest.approx(math.exp(-sum(logs) / len(logs)), rel=1e-4)


@pytest.mark.parametrize("family", DECODERS)
def test_a_batch_of_prompts_writes_what_each_prompt_writes_alone(family: str) -> None:
    model, reader = adapted(family), tokenizer()
    side = reader.padding_side
    alone = [evaluate.generate_texts(model, reader, [text], max_new_tokens=8)[0] for text in CONTEXTS]
    for batch_size in (2, 16):
        together = evaluate.generate_texts(model, reader, CONTEXTS, max_new_tokens=8, batch_size=batch_size)
        assert together == alone
    assert reader.padding_side == side
    assert len(set(alone)) > 1


def test_the_likeliest_text_is_written_token_by_token() -> None:
    model, reader = adapted("llama"), tokenizer()
    ids = reader("so")["input_ids"]
    for _ in range(6):
        ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
    (text,) = evaluate.generate_texts(model, reader, ["so"], max_new_tokens=6)
    assert text == reader.decode(ids[2:], skip_special_tokens=True)


def test_drawn_texts_depend_on_the_seed_and_leave_the_random_state_alone() -> None:
    model, state = adapted("llama"), torch.get_rng_state()

    def draw(seed: int) -> list[str]:
        return evaluate.generate_texts(model, tokenizer(), CONTEXTS, max_new_tokens=8, temperature=1.0, seed=seed)

    assert draw(1) == draw(1) != draw(2)
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(BadData, match="prompt is empty"):
        evaluate.generate_texts(model, tokenizer(), [""], max_new_tokens=8)


def test_neighbouring_rows_write_with_their_own_adapters() -> None:
    model = adapted("llama")
    sides: list[str | None] = ["a", None, "a"]
    alone = []
    for side in sides:
        with lk.use(model, side):
            alone += evaluate.generate_texts(model, tokenizer(), ["so fine"], max_new_tokens=8)
    with lk.use(model, sides):
        assert evaluate.generate_texts(model, tokenizer(), ["so fine"] * 3, max_new_tokens=8) == alone
    assert alone[0] != alone[1]


def test_exact_match_counts_the_texts_that_are_the_targets() -> None:
    model = adapted("llama")
    texts = evaluate.generate_texts(model, tokenizer(), CONTEXTS, max_new_tokens=4)
    shown = [Example(text, written) for text, written in zip(CONTEXTS, texts, strict=True)]
    assert evaluate.exact_match(model, tokenizer(), shown, max_new_tokens=4) == 1.0
    shown[0] = Example(shown[0].context, "something else")
    assert evaluate.exact_match(model, tokenizer(), shown, max_new_tokens=4) == 0.8


def test_a_classifiers_accuracy_is_that_of_one_text_at_a_time() -> None:
    model = adapted("bert", labels=3)
    choices = [int(model(input_ids=torch.tensor([tokenizer()(t)["input_ids"]])).logits.argmax()) for t in CONTEXTS]
    shown = [Example(text, "", label) for text, label in zip(CONTEXTS, choices, strict=True)]
    assert evaluate.classification_accuracy(model, tokenizer(), shown, batch_size=2) == 1.0
    shown[1] = Example(shown[1].context, "", (choices[1] + 1) % 3)
    assert evaluate.classification_accuracy(model, tokenizer(), shown, batch_size=2) == 0.8


def test_base_and_adapter_stand_side_by_side_and_the_model_stays_as_it_was() -> None:
    model = adapted("llama")
    model.lm_head.train()
    modes = [module.training for module in model.modules()]

    def measure() -> float:
        return evaluate.perplexity(model, tokenizer(), examples([" good", " bad"]))

    found = evaluate.compare(model, {"base": None, "adapter": "a"}, measure)
    assert found["adapter"] == measure()
    assert found["base"] == pytest.approx(evaluate.perplexity(tiny("llama"), tokenizer(), examples([" good", " bad"])))
    assert found["base"] != found["adapter"]
    assert modes == [module.training for module in model.modules()]


def test_texts_longer_than_the_model_reads_are_cut() -> None:
    long = [Example("a fine film " * 20, " a", 0), Example("so", " b", 1)]
    model = adapted("gpt2")
    assert 0 <= evaluate.label_accuracy(model, tokenizer(), long, ["a", "b"]) <= 1
    assert math.isfinite(evaluate.perplexity(model, tokenizer(), long))
    assert 0 <= evaluate.exact_match(model, tokenizer(), long, max_new_tokens=3) <= 1
    for family in ("bert", "roberta"):
        assert 0 <= evaluate.classification_accuracy(tiny(family, labels=2), tokenizer(), long) <= 1


def test_a_classifier_writes_nothing() -> None:
    model = tiny("bert", labels=2)
    with pytest.raises(BadModel, match="no language-model head"):
        evaluate.perplexity(model, tokenizer(), examples(["a", "b"]))
    with pytest.raises(BadModel, match="no language-model head"):
        evaluate.generate_texts(model, tokenizer(), ["a"])

"""Token ids: nothing is lost or added, the boundary lies between context and target, and the target stays."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from lorakit.data import Encoded, Example, TooShort, encode, encode_texts, open_data
from lorakit.errors import BadData
from lorakit.models import load

EXAMPLES = [
    Example("Review: the film is a fine film .\nSentiment:", " positive"),
    Example("a ☃ 雪", "é snow ☃☃"),  # characters of several tokens on both sides
    Example("the fil", "m is bad"),  # the boundary lies inside a word
    Example("", "the film"),
    Example("the film\n", "bad"),
]


def test_context_and_target_are_the_whole_text(tokenizer: PreTrainedTokenizerFast) -> None:
    for example, encoded in zip(EXAMPLES, encode(EXAMPLES, tokenizer, 64), strict=True):
        joint = tokenizer(example.context + example.target)["input_ids"]
        assert list(encoded.ids) == [*joint, tokenizer.eos_token_id]
        assert encoded.cut_context == encoded.cut_target == 0


def test_the_first_token_that_reaches_into_the_target_is_the_first_of_it(tokenizer: PreTrainedTokenizerFast) -> None:
    for example, encoded in zip(EXAMPLES, encode(EXAMPLES, tokenizer, 64), strict=True):
        before = tokenizer.decode(encoded.ids[: encoded.start])
        until = tokenizer.decode(encoded.ids[: encoded.start + 1])
        if example.context:
            assert example.context.startswith(before)
            assert not example.context.startswith(until) or until == example.context
        else:
            assert encoded.start == 1


@pytest.mark.parametrize("max_length", range(3, 30))
def test_the_context_is_cut_from_the_left_so_that_the_target_stays(
    tokenizer: PreTrainedTokenizerFast, tokenizer_with_bos: PreTrainedTokenizerFast, max_length: int
) -> None:
    for tokens, first in ((tokenizer, []), (tokenizer_with_bos, [tokenizer_with_bos.bos_token_id])):
        (whole,), (cut,) = (encode(EXAMPLES[:1], tokens, length) for length in (1000, max_length))
        assert len(cut.ids) == min(len(whole.ids), max_length)
        assert cut.ids[cut.start :] == whole.ids[whole.start :]
        assert list(cut.ids[: len(first)]) == first
        kept = cut.ids[len(first) : cut.start]
        assert whole.ids[: whole.start][len(whole.ids[: whole.start]) - len(kept) :] == kept
        assert cut.cut_context == whole.start - cut.start


def test_a_target_that_does_not_fit_is_cut_on_the_right_and_counted(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    short, long = Example("is it", " bad"), Example("is it", " the film" * 9)
    fitted, cut = encode([short, long], tokenizer, 8)
    (whole,) = encode([long], tokenizer, 1000)
    assert fitted.cut_target == 0
    assert cut.ids[cut.start :] == whole.ids[whole.start :][: len(cut.ids) - cut.start]
    assert (len(cut.ids), cut.start) == (8, 1)
    assert cut.cut_target == len(whole.ids) - whole.start - 7
    assert "1 targets of 2 examples" in caplog.text


def test_a_limit_that_no_target_fits_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TooShort, match="every target is cut off by max_length=2") as refused:
        encode(EXAMPLES, tokenizer, 2)
    fitted = encode(EXAMPLES, tokenizer, refused.value.least)
    assert any(not example.cut_target for example in fitted)
    with pytest.raises(TooShort) as at_one:
        encode(EXAMPLES, tokenizer, 1)
    assert at_one.value.least == refused.value.least


def test_the_first_token_of_the_tokenizer_comes_once(tokenizer_with_bos: PreTrainedTokenizerFast) -> None:
    plain, marked = encode([Example("the film", " is bad"), Example("<s>the film", " is bad")], tokenizer_with_bos, 64)
    assert plain.ids == marked.ids
    assert plain.ids.count(tokenizer_with_bos.bos_token_id) == 1


def test_eos_can_be_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    (ended,), (open_ended,) = (encode(EXAMPLES[:1], tokenizer, 64, with_eos=end) for end in (True, False))
    assert ended.ids == (*open_ended.ids, tokenizer.eos_token_id)


def test_classifiers_get_the_tokenizers_own_tokens() -> None:
    _, tokenizer = load("minilm-l6")
    examples = [Example("a fine film", "", 1), Example("a bad film " * 9, "", 0)]
    whole, cut = encode_texts(examples, tokenizer, 8)
    assert whole == Encoded(tuple(tokenizer("a fine film")["input_ids"]), start=5, label=1)
    assert (len(cut.ids), cut.ids[-1], cut.start, cut.label) == (8, tokenizer.sep_token_id, 8, 0)
    assert cut.cut_context == 27 + 2 - 8
    short = encode_texts(examples, tokenizer, 3)
    assert [example.ids[1] for example in short] == [whole.ids[1], cut.ids[1]]
    for length in (2, 1):
        with pytest.raises(TooShort, match=r"beside the special tokens \(2\); allow 3 or more") as refused:
            encode_texts(examples, tokenizer, length)
        assert refused.value.least == 3
    with pytest.raises(BadData, match="needs labels"):
        encode_texts([Example("a", " b")], tokenizer, 8)


@pytest.mark.slow
def test_smollm2_learns_exactly_the_label_of_a_review() -> None:
    _, tokenizer = load("smollm2-135m")
    reviews = open_data("reviews")
    encoded = encode(reviews.test, tokenizer, 128)
    for example, tokens in zip(reviews.test, encoded, strict=True):
        assert tokenizer.decode(tokens.ids[: tokens.start]) == example.context
        assert tokenizer.decode(tokens.ids[tokens.start :]) == example.target + tokenizer.eos_token
        assert list(tokens.ids[: tokens.start]) == tokenizer(example.context)["input_ids"]

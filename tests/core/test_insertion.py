"""Places put into a sequence: callers never see them, and a row in a batch is what it is alone."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint
from transformers import DynamicCache, PreTrainedModel

import lorakit as lk
from lorakit.core.insertion import contexts, longest_insertion
from lorakit.core.method import Method
from lorakit.core.stack import stack_path
from lorakit.core.state import state_of
from lorakit.data.batches import Batch
from lorakit.errors import BadData, BadMethod, BadRouting, BadState
from lorakit.methods.prefix_embedding import PrefixEmbedding
from lorakit.methods.prefix_layer import PrefixLayer
from lorakit.train.padded import picked_backward
from lorakit.train.portions import Portion
from tests.laws.cases import CORE, close, scramble
from tests.tiny import DECODERS, inputs, tiny, tokens

FORMS: dict[str, Method] = {
    "words": PrefixEmbedding(prefix=3, infix=2),
    "hidden": PrefixLayer(prefix=3, infix=2),
    "key-value": PrefixLayer(prefix=2, infix=3, form="key-value"),
}
every_form = pytest.mark.parametrize("form", FORMS)


def slow(family: str) -> Any:
    return pytest.param(family, marks=pytest.mark.slow)


DECODERS_SLOWLY = ["llama", "gpt2", *(slow(family) for family in DECODERS if family not in ("llama", "gpt2"))]
PADDING = 0  # of the tiny models
LENGTHS = (7, 4, 5)


def prefixed(family: str, form: str = "words", *names: str, **size: Any) -> PreTrainedModel:
    model = tiny(family, **size)
    for number, name in enumerate(names or ("a",)):
        lk.attach(model, FORMS[form], name=name)
        scramble(model, name, seed=number, std=0.3)
    return model


def ragged(model: PreTrainedModel, *, left: bool) -> tuple[Tensor, Tensor]:
    """Rows of different lengths, padded on one side, and their mask."""
    ids_BT, places = tokens(model), torch.arange(7)
    mask_BT = torch.stack([places >= 7 - n if left else places < n for n in LENGTHS]).long()
    return torch.where(mask_BT.bool(), ids_BT, PADDING), mask_BT


def greedy(model: PreTrainedModel, ids_1T: Tensor, steps: int) -> Tensor:
    """The most likely next token, over and over, reading the whole sequence each time."""
    for _ in range(steps):
        with contexts(model, torch.tensor([ids_1T.shape[1] - _])):
            logits_1TV = model(ids_1T).logits
        ids_1T = torch.cat([ids_1T, logits_1TV[:, -1:].argmax(-1)], 1)
    return ids_1T


@torch.no_grad()
@every_form
@pytest.mark.parametrize("family", [*DECODERS_SLOWLY, "bert", "roberta", *map(slow, ("deberta", "deberta-v2"))])
def test_a_row_padded_on_the_right_is_what_it_is_alone(family: str, form: str) -> None:
    if (family, form) == ("deberta-v2", "key-value"):
        pytest.skip("refused: it projects the relative positions with the same weights")
    model = prefixed(family, form)
    ids_BT, mask_BT = ragged(model, left=False)
    together = model(input_ids=ids_BT, attention_mask=mask_BT)[0]
    for row, length in enumerate(LENGTHS):
        assert close(together[row, :length], model(ids_BT[row : row + 1, :length])[0][0])
    with lk.use(model, None):
        assert not close(model(input_ids=ids_BT, attention_mask=mask_BT)[0], together)


@torch.no_grad()
@every_form
@pytest.mark.parametrize("family", DECODERS_SLOWLY)
def test_generate_is_a_loop_of_whole_forwards(family: str, form: str) -> None:
    model = prefixed(family, form)
    ids_BT, mask_BT = ragged(model, left=True)
    said = dict(attention_mask=mask_BT, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=PADDING)
    together = model.generate(ids_BT, **said)
    assert torch.equal(together, model.generate(ids_BT, **said, use_cache=False))
    with contexts(model, torch.tensor([7, 7, 7])):
        assert torch.equal(together, model.generate(ids_BT, **said))
    for row, length in enumerate(LENGTHS):
        assert torch.equal(together[row, 7 - length :], greedy(model, ids_BT[row : row + 1, 7 - length :], 5)[0])


@torch.no_grad()
@pytest.mark.parametrize(
    "how", [dict(num_beams=3), dict(num_beams=4, num_return_sequences=2), dict(do_sample=True, num_return_sequences=2)]
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_beams_and_samples_are_the_same_with_and_without_a_cache(family: str, how: dict[str, Any]) -> None:
    model, found = prefixed(family), []
    ids_BT, mask_BT = ragged(model, left=True)
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(model.generate(ids_BT, attention_mask=mask_BT, max_new_tokens=5, use_cache=use_cache, **how))
    assert torch.equal(*found)
    with lk.use(model, None):
        assert not torch.equal(model.generate(ids_BT, attention_mask=mask_BT, max_new_tokens=5, **how), found[0])


@torch.no_grad()
@every_form
def test_an_encoder_is_given_its_places_once(form: str) -> None:
    model = prefixed("t5", form)
    ids_BT, mask_BT = ragged(model, left=False)
    said = dict(max_new_tokens=5, do_sample=False, eos_token_id=None)
    together = model.generate(ids_BT, attention_mask=mask_BT, **said)
    for row, length in enumerate(LENGTHS):
        assert torch.equal(together[row], model.generate(ids_BT[row : row + 1, :length], **said)[0])
    with lk.use(model, None):
        assert not torch.equal(model.generate(ids_BT, attention_mask=mask_BT, **said), together)


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "deberta", "llama"])
def test_token_types_of_tokenizers_are_taken(family: str) -> None:
    model = prefixed(family)
    ids_BT = tokens(model)
    assert close(model(input_ids=ids_BT, token_type_ids=torch.zeros_like(ids_BT))[0], model(ids_BT)[0])


@torch.no_grad()
def test_another_thread_is_refused_and_changes_nothing() -> None:
    model, found = prefixed("gpt2"), []
    ids_BT = tokens(model)
    expected = model(ids_BT, labels=ids_BT).logits

    def intrude(*_: object) -> None:
        with ThreadPoolExecutor(1) as pool:
            found.append(pool.submit(model, ids_BT[:1], labels=ids_BT[:1]).exception())

    with lk.use(model, "a"):
        handle = model.transformer.h[0].register_forward_hook(intrude)  # in the middle of our own forward
        assert torch.equal(model(ids_BT, labels=ids_BT).logits, expected)
        handle.remove()
    assert isinstance(found[0], BadState)


@torch.no_grad()
@every_form
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_steps_from_a_cache_are_one_whole_forward(family: str, form: str) -> None:
    model = prefixed(family, form)
    ids_BT, mask_BT = ragged(model, left=True)
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    with contexts(model, torch.tensor([5])):
        whole = model(ids_BT, attention_mask=mask_BT, position_ids=positions_BT).logits
    cache, steps = DynamicCache(config=model.config), []
    for start, stop in ((0, 5), (5, 6), (6, 7)):
        steps.append(
            model(
                ids_BT[:, start:stop],
                attention_mask=mask_BT[:, :stop],
                position_ids=positions_BT[:, start:stop],
                past_key_values=cache,
            ).logits
        )
    stepwise = torch.cat(steps, 1)
    for row, length in enumerate(LENGTHS):
        assert close(stepwise[row, 7 - length :], whole[row, 7 - length :])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi"])
def test_padding_on_the_left_needs_no_positions_where_only_distances_count(family: str) -> None:
    model = prefixed(family)
    ids_BT, mask_BT = ragged(model, left=True)
    together = model(ids_BT, attention_mask=mask_BT).logits
    for row, length in enumerate(LENGTHS):
        alone = model(ids_BT[row : row + 1, 7 - length :]).logits[0]
        assert close(together[row, 7 - length :], alone, 1e-4)


@torch.no_grad()
def test_positions_that_are_told_start_where_they_started() -> None:
    model = prefixed("roberta")
    ids_BT, mask_BT = ragged(model, left=False)
    positions_BT = PADDING + 1 + torch.arange(7).expand(3, -1)  # RoBERTa's own count
    told = model(input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions_BT)[0]
    own = model(input_ids=ids_BT, attention_mask=mask_BT)[0]
    for row, length in enumerate(LENGTHS):
        assert close(told[row, :length], own[row, :length])


@torch.no_grad()
@every_form
def test_an_infix_lies_between_context_and_target(form: str) -> None:
    model = prefixed("gpt2", form)
    ids_BT, ends_B = tokens(model), torch.tensor([3, 5, 7])
    with contexts(model, ends_B):
        together = model(ids_BT).logits
    for row, end in enumerate(ends_B.tolist()):
        with contexts(model, torch.tensor([end])):
            assert close(model(ids_BT[row : row + 1]).logits[0], together[row])
        context = model(ids_BT[row : row + 1, :end]).logits[0]  # all that is given is context
        assert close(context, together[row, :end])
    whole = model(ids_BT).logits
    assert close(whole[2], together[2])
    assert not close(whole[0, 3:], together[0, 3:])


@torch.no_grad()
def test_labels_tell_where_the_target_begins() -> None:
    model = prefixed("llama")
    ids_BT, mask_BT = ragged(model, left=False)
    labels_BT = torch.where((torch.arange(7) >= 2) & mask_BT.bool(), ids_BT, -100)
    labels_BT[1] = -100  # nothing is labelled: all of the row is context
    loss, logits = model(ids_BT, attention_mask=mask_BT, labels=labels_BT)[:2]
    with contexts(model, torch.tensor([2, -1, 2])):
        expected = model(ids_BT, attention_mask=mask_BT).logits
    assert close(logits, expected)
    wanted_BT = labels_BT[:, 1:] != -100
    mean = nn.functional.cross_entropy(expected[:, :-1][wanted_BT], labels_BT[:, 1:][wanted_BT])
    assert close(loss, mean)
    assert close(model(ids_BT[1:2, :4]).logits[0], logits[1, :4])
    assert state_of(model).context_ends_B is None  # forgotten at once
    with pytest.raises(BadRouting, match="3 rows"), contexts(model, torch.tensor([2, 2, 2])):
        model(ids_BT[:2])


@every_form
def test_the_loss_of_training_is_the_models_own(form: str) -> None:
    model = prefixed("gpt2", form).train()
    ids_BT, mask_BT = ragged(model, left=False)
    labels_BT = torch.where((torch.arange(7) >= 2) & mask_BT.bool(), ids_BT, -100)
    count = int((labels_BT[:, 1:] != -100).sum())
    model(ids_BT, attention_mask=mask_BT, labels=labels_BT).loss.backward()
    expected = [parameter.grad.clone() for parameter in lk.parameters(model)]
    model.zero_grad()
    picked_backward(model, Portion(Batch(ids_BT, mask_BT, labels_BT, None), len(ids_BT), count, 0), count)
    for parameter, gradient in zip(lk.parameters(model), expected, strict=True):
        assert torch.equal(gradient, parameter.grad) or close(parameter.grad, gradient)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_callers_see_the_length_they_gave(family: str) -> None:
    model = prefixed(family)
    given = inputs(model)
    told = model(**given, output_hidden_states=True, return_dict=True)
    several = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
    hidden = [state for name in several for state in told.get(name) or ()]
    assert len(hidden) >= 3
    assert all(state.shape[:2] == (3, 7) for state in [*hidden, told[0]])
    as_tuple = model(**given, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], told[0])


@torch.no_grad()
def test_a_classifier_reads_the_first_token_not_the_prefix() -> None:
    model = tiny("bert", labels=3)
    lk.attach(model, PrefixEmbedding(prefix=3, train="classifier"))
    seen: list[Tensor] = []
    handle = model.bert.embeddings.word_embeddings.register_forward_hook(lambda _, args, y: seen.append(args[0]))
    ids_BT = tokens(model)
    logits = model(ids_BT).logits
    handle.remove()
    assert torch.equal(seen[0][:, 0], ids_BT[:, 0])
    assert torch.equal(seen[0][:, 4:], ids_BT[:, 1:])
    assert logits.shape == (3, 3)


@torch.no_grad()
def test_adapters_of_different_lengths_take_turns() -> None:
    model = tiny("llama")
    ids_BT, found = tokens(model), {None: model(tokens(model)).logits}
    methods = {"short": PrefixEmbedding(prefix=2), "long": PrefixLayer(prefix=5, infix=1), "lora": lk.LoRA(rank=2)}
    for name, method in methods.items():
        lk.attach(model, method, name=name)
        scramble(model, name)
        found[name] = model(ids_BT).logits
    for name in ("long", None, "lora", "short", "lora", "long"):
        with lk.use(model, name):
            assert torch.equal(model(ids_BT).logits, found[name])
            assert ("generate" in vars(model)) == (name == "long")
    assert longest_insertion(model) == 6
    lk.detach(model, "long")
    lk.detach(model, "lora")
    with lk.use(model, "short"):
        assert torch.equal(model(ids_BT).logits, found["short"])
    assert longest_insertion(model) == 2


@every_form
def test_detaching_leaves_nothing_on_the_model_or_its_stack(form: str) -> None:
    model = tiny("llama")
    attributes = set(vars(model))
    lk.attach(model, lk.LoRA(rank=2), name="lora")
    lk.attach(model, FORMS[form], name="a")
    lk.detach(model, "a")
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert "adapters" not in model.model._modules
    lk.detach(model, "lora")
    assert set(vars(model)) == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("adapters" in module._modules for module in model.modules())


@torch.no_grad()
def test_copies_are_models_of_their_own_while_an_infix_is_in_force(tmp_path) -> None:
    model = prefixed("gpt2")
    ids_BT = tokens(model)
    said = dict(max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=PADDING)
    expected = model.generate(ids_BT, **said)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        scramble(twin, "a", seed=9, std=3.0)
        assert not torch.equal(twin.generate(ids_BT, **said), expected)
        assert torch.equal(model.generate(ids_BT, **said), expected)
    lk.save(model, "a", tmp_path / "a")
    again = tiny("gpt2")
    lk.load(again, tmp_path / "a")
    assert torch.equal(again(ids_BT).logits, model(ids_BT).logits)
    assert torch.equal(again.generate(ids_BT, **said), expected)


def test_what_cannot_hold_a_prefix_is_refused_before_anything_changes() -> None:
    for model, words in ((tiny("vit"), "no blocks that read token ids"), (tiny("roberta"), "65 places.*65 positions")):
        attributes = set(vars(model))
        with pytest.raises(BadMethod, match=words):
            lk.attach(model, PrefixEmbedding(prefix=60, infix=5))
        assert set(vars(model)) == attributes
        assert all(parameter.requires_grad for parameter in model.parameters())


@torch.no_grad()
def test_batches_that_cannot_be_lengthened_are_refused_and_the_next_one_is_well() -> None:
    model = prefixed("gpt2")
    ids_BT = tokens(model)
    expected, mask_BT = model(ids_BT).logits, torch.ones_like(ids_BT)
    square = torch.ones(3, 1, 7, 7, dtype=torch.bool)
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    for words, given in {
        "not inputs_embeds": dict(inputs_embeds=torch.zeros(1, 2, 32)),
        "pairs of tokens": dict(input_ids=ids_BT, attention_mask=square),
        "third dimension": dict(input_ids=ids_BT[None]),
        "does not fit": dict(input_ids=ids_BT, attention_mask=mask_BT[:, 1:]),
        "start again": dict(input_ids=ids_BT, position_ids=packed),
        "leave them out": dict(input_ids=ids_BT, token_type_ids=torch.zeros_like(ids_BT)),
    }.items():
        with pytest.raises(BadRouting, match=words):
            model(**given)
        assert torch.equal(model(ids_BT).logits, expected)
    with pytest.raises(BadData, match="60 tokens and a prefix of 5 need 65 positions, but the model has 64"):
        model(tokens(model, 1, 60))
    with pytest.raises(ValueError, match="stop here"):
        _fail_inside(model, ids_BT)
    assert torch.equal(model(ids_BT).logits, expected)


def _fail_inside(model: PreTrainedModel, ids_BT: Tensor) -> None:
    def fail(*_: object) -> None:
        raise ValueError("stop here")

    handle = model.transformer.h[1].register_forward_hook(fail)
    try:
        model(ids_BT, labels=ids_BT)
    finally:
        handle.remove()
        assert state_of(model).within is None
        assert state_of(model).context_ends_B is None


@torch.no_grad()
def test_caches_that_do_not_fit_are_refused() -> None:
    model = prefixed("llama")
    ids_BT, mask_BT = tokens(model), torch.ones(3, 8, dtype=torch.long)
    with lk.use(model, None):
        foreign = model(ids_BT).past_key_values
    with pytest.raises(BadRouting, match="begun without the prefix"):
        model(ids_BT[:, :1], attention_mask=mask_BT, past_key_values=foreign)
    holes_BT = mask_BT.clone()
    holes_BT[0, 5:7] = 0
    own = model(ids_BT, attention_mask=holes_BT[:, :7]).past_key_values
    with pytest.raises(BadRouting, match="pad on the left"):
        model(ids_BT[:, :1], attention_mask=holes_BT, past_key_values=own)
    with pytest.raises(BadRouting, match="prefill_chunk_size"), contexts(model, torch.tensor([7])):
        model(ids_BT[:, :3])
    with pytest.raises(BadRouting, match="no room for a prefix"):
        model.generate(ids_BT, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(BadData, match="64"):
        model.generate(ids_BT, max_new_tokens=60, eos_token_id=None)


def test_prefixes_share_no_batch_and_no_mixture_and_cannot_be_merged() -> None:
    model = prefixed("llama", "words", "a", "b")
    with pytest.raises(BadRouting, match="makes the sequence longer"):
        lk.use(model, ["a", "b"])
    with pytest.raises(BadRouting, match="mixture"):
        lk.use(model, {"a": 0.5, "b": 0.5})
    with pytest.raises(lk.errors.NotMergeable, match="makes the sequence longer"):
        lk.merge(model, "a")


checkpointing = pytest.mark.filterwarnings("ignore")
reentrant = pytest.mark.parametrize("reentrant", [False, True])


def _gradients(model: PreTrainedModel) -> list[Tensor]:
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in lk.parameters(model)]
    model.zero_grad()
    return found


@checkpointing
@reentrant
@every_form
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_checkpointing_gives_the_same_gradients(family: str, form: str, reentrant: bool) -> None:
    model = tiny(family, labels=3)
    head = "classifier" if family == "bert" else "score"  # it acts outside of the stack, on what is shortened
    fields = {name: getattr(FORMS[form], name) for name in ("prefix", "infix", "form") if hasattr(FORMS[form], name)}
    lk.attach(model.train(), type(FORMS[form])(**fields, train=head), name="a")
    model.config.pad_token_id = PADDING
    batches = [ragged(model, left=False), (tokens(model, 3, 7, seed=1), torch.ones(3, 7, dtype=torch.long))]
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        for ids_BT, mask_BT in batches:
            model(input_ids=ids_BT, attention_mask=mask_BT).logits.pow(2).mean().backward()
        found.append(_gradients(model))
    assert all(gradient.any() for gradient in found[0][:1])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other) or close(one, other)


@checkpointing
@reentrant
def test_forwards_that_await_backward_together_give_the_same_gradients_or_an_error(reentrant: bool) -> None:
    model = prefixed("gpt2", "key-value").train()
    same = tokens(model)
    (model(same).logits.mean() + model(same).logits.pow(2).mean()).backward()
    expected = _gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    (model(same).logits.mean() + model(same).logits.pow(2).mean()).backward()
    for one, gradient in zip(_gradients(model), expected, strict=True):
        assert close(one, gradient)
    with pytest.raises((BadState, CheckpointError)):
        (model(same).logits.mean() + model(tokens(model, 3, 5)).logits.mean()).backward()
    ends = [torch.tensor([2]), torch.tensor([4])]  # the same shapes, the infix elsewhere
    with pytest.raises((BadState, CheckpointError)):
        sum(_mean_in(model, same, end) for end in ends).backward()
    model.zero_grad()
    _mean_in(model, same, ends[0]).backward()
    assert any(gradient.any() for gradient in _gradients(model))


def _mean_in(model: PreTrainedModel, ids_BT: Tensor, end: Tensor) -> Tensor:
    with contexts(model, end):
        return model(ids_BT).logits.mean()


@checkpointing
def test_a_whole_forward_is_recomputed_as_it_ran() -> None:
    model = prefixed("gpt2", "words", "a", "b").train()
    ids_BT, found = tokens(model), []
    x = torch.ones(1, requires_grad=True)
    for run in (
        lambda: model(ids_BT).logits * x,
        lambda: checkpoint(lambda x: model(ids_BT).logits * x, x, use_reentrant=False),
    ):
        with lk.use(model, "a"):
            loss = run().pow(2).mean()
        loss.backward()  # where b is in force
        found.append(_gradients(model))
        assert state_of(model).routing is not None
        assert state_of(model).routing.names == ("b",)
    for one, other in zip(*found, strict=True):
        assert close(one, other) or not (one.any() or other.any())


@torch.no_grad()
@every_form
@pytest.mark.parametrize("family", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in CORE[1:3])])
def test_a_compiled_model_reads_the_longer_sequence_and_compiles_once(family: str, form: str) -> None:
    torch._dynamo.reset()
    model, graphs, first = prefixed(family, form), [], 0

    def counting(graph: torch.fx.GraphModule, _: object) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=counting)
    for seed in range(3):
        ids_BT, mask_BT = ragged(model, left=False)
        ids_BT = torch.where(mask_BT.bool(), tokens(model, seed=seed), PADDING)
        given = dict(input_ids=ids_BT, attention_mask=mask_BT)
        assert close(compiled(**given)[0], model(**given)[0])
        first = first or len(graphs)
    assert len(graphs) == first
    assert stack_path(model) == {"llama": "model", "gpt2": "transformer", "bert": ""}[family]

"""The planner's numbers against what really happens, and what it chooses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import lorakit as lk
from lorakit.core.method import Method
from lorakit.core.state import attached_to, deltas_of
from lorakit.errors import BadMethod, LorakitError, UnknownName
from lorakit.reproduce.planning import without_values
from lorakit.train import Train, planner
from lorakit.train import machine as machine_module
from lorakit.train.arithmetic import Shape, flops, kept_per_token, shape_of_model
from lorakit.train.fitting import SHARE, Need, Wanted, choose
from lorakit.train.head import backward_from
from lorakit.train.machine import SHEETS, Machine, free_memory, machine, measured_flops, usual_dtype
from lorakit.train.planner import Lengths, plan, plan_attached
from lorakit.train.probe import Kept, kept_bytes, probe, skeleton
from tests.tiny import inputs, tiny

QV = lk.LoRA(rank=4, targets=("attn.q", "attn.v"))
ALL = lk.LoRA(rank=4, targets=("linear",))
CPU = Machine("cpu", "cpu", 10**10, 1e11, "told")


def planned(model: PreTrainedModel, method: Method = QV, memory: float = 1e10, **fields: Any) -> Any:
    """A forecast for examples of 64 tokens, 16 in a batch."""
    settings = Train(**{"max_length": 64, **fields})
    return plan(model, method, settings, Lengths(), replace(CPU, memory_bytes=int(memory)))


def attached(model: PreTrainedModel, method: Method) -> PreTrainedModel:
    lk.attach(model, method, name="a")
    return model.train()


def really_kept(model: PreTrainedModel, rows: int, length: int) -> int:
    """Bytes of the distinct storages that autograd saves of a forward pass on the CPU, without parameters."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (storage := tensor.untyped_storage()).data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = model.base_model(input_ids=torch.ones(rows, length, dtype=torch.long))
    assert found is not None
    return sum(storage.nbytes() for storage in kept.values())


KEPT = [
    *((family, method) for family in ("llama", "gpt2", "bert") for method in (QV, ALL, lk.Full(), lk.Bottleneck())),
    *((family, ALL) for family in ("phi", "phi3", "gemma2", "qwen3", "gptj", "opt", "deberta-v2", "mixtral")),
    *(("gpt2", method) for method in (lk.DoRA(), lk.VeRA(), lk.BitFit(), lk.IA3(), lk.PrefixLayer())),
]


@pytest.mark.parametrize(("family", "method"), KEPT, ids=[f"{family}-{method.name}" for family, method in KEPT])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_a_copy_without_values_keeps_is_what_the_model_keeps(family: str, method: Method, dropout: float) -> None:
    model = tiny(family, use_cache=False)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    bare = attached(skeleton(model), method)
    model = attached(model, method)
    for rows in (1, 3):
        assert kept_bytes(bare, rows, 16, "cpu") == really_kept(model, rows, 16)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("method", [QV, ALL], ids=["q,v", "linear"])
def test_the_formula_agrees_with_the_probe_to_five_percent(family: str, method: Method) -> None:
    bare = attached(skeleton(tiny(family)), method)
    probed = probe(bare, 32, "cpu")
    assert probed is not None
    assert kept_per_token(bare, attached_to(bare, "a").plan) == pytest.approx(probed.per_token, rel=0.05)


@pytest.mark.parametrize("family", ["t5", "mixtral"])
def test_a_model_that_cannot_run_without_values_is_planned_by_the_formula(family: str) -> None:
    options = {"experts_implementation": "eager"} if family == "mixtral" else {}
    found = planned(tiny(family, **options))
    assert found.kept.source == "formula"
    assert found.fits and found.kept.per_token > 0


STEPPED = [QV, ALL, lk.DoRA(), lk.AdaLoRA(), lk.VeRA(), lk.LoKr(), lk.IA3(), lk.BitFit(), lk.Bottleneck(),
           lk.PrefixLayer(), lk.LoRA(train=("h.1.ln_2",)), lk.Full(top=1)]  # fmt: skip


@pytest.mark.parametrize("method", STEPPED, ids=[f"{number}-{method.name}" for number, method in enumerate(STEPPED)])
def test_bytes_are_those_of_a_real_step_and_a_real_file(method: Method, tmp_path: Path) -> None:
    model = tiny("gpt2", tied=True)
    found = planned(model, method).bytes
    assert found.weights == sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    lk.attach(model, method, name="a")
    lk.save(model, "a", tmp_path)
    trained = lk.parameters(model, "a")
    optimizer = torch.optim.AdamW(trained)
    model.train()(**inputs(model)).logits.square().mean().backward()
    optimizer.step()
    own = {id(t): t for delta in deltas_of(model, "a") for t in (*delta.parameters(), *delta.buffers())}
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert found.trained == sum(tensor.nbytes for tensor in own.values())
    assert found.gradients == sum(parameter.grad.nbytes for parameter in trained)
    assert found.optimiser == sum(value.nbytes for value in states)
    written = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert found.file == len(written) - 8 - int.from_bytes(written[:8], "little")


def peak_bytes(work: Callable[[], object], trace: Path) -> int:
    """The most bytes that tensors held while it worked, above those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    profiled.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    told = [e["args"] for e in sorted(events, key=lambda event: event["ts"])]
    return max(each["Total Allocated"] for each in told) - (told[0]["Total Allocated"] - told[0]["Bytes"])


@pytest.mark.parametrize("vocabulary", [64, 8000])
@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_peak_of_a_real_pass_is_the_forecast_to_fifteen_percent(
    family: str, checkpointing: str, vocabulary: int, tmp_path: Path
) -> None:
    sizes = {"intermediate_size": 352} if family == "llama" else {"n_inner": 352}
    model = tiny(family, hidden_size=128, num_hidden_layers=8, vocab_size=vocabulary, **sizes)
    found = planned(model, ALL)
    if checkpointing == "blocks":
        found = planned(model, ALL, memory=(found.bytes.state + 0.45 * found.choice.activations) / 0.9)
    assert (found.checkpointing, found.forward_tokens) == (checkpointing, 1024)
    attached(model, ALL)
    if checkpointing == "blocks":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(3, 64, (16, 64))

    def step() -> None:
        hidden_BTH = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        backward_from(model, hidden_BTH.flatten(0, 1)[:], ids.flatten(), 1.0)

    step()
    peak = peak_bytes(step, tmp_path / "trace.json")
    assert found.choice.activations + found.choice.working == pytest.approx(peak, rel=0.15)


ONEDNN = {torch.ops.mkldnn._linear_pointwise: lambda x, w, *others, **named: 2 * x[0] * x[1] * w[0]}  # shapes


def counted(model: PreTrainedModel, length: int) -> tuple[int, int]:
    """Operations of a forward pass over four sequences, and of forward and backward, as PyTorch counts them."""
    with FlopCounterMode(display=False, custom_mapping=ONEDNN) as counter:
        found = model(input_ids=torch.randint(3, 60, (4, length)), use_cache=False).logits
        forward = counter.get_total_flops()
        found.sum().backward()
    return forward, counter.get_total_flops()


BELOW = lk.LoRA(rank=4, targets=("layers.6.*q_proj",))


@pytest.mark.parametrize("method", [QV, ALL, lk.Full(), BELOW, lk.Bottleneck()], ids=lambda method: method.name)
def test_operations_are_those_that_pytorch_counts_to_three_percent(method: Method) -> None:
    model = tiny("llama", hidden_size=128, intermediate_size=352, num_hidden_layers=12, attn_implementation="eager")
    found = planned(model, method, max_length=4).flops
    forward, step = counted(attached(model, method), 4)
    assert found.forward * 16 == pytest.approx(forward, rel=0.03)
    assert found.step * 16 == pytest.approx(step, rel=0.03)


def test_attention_is_counted_too_and_half_of_it_where_it_is_causal() -> None:
    model = tiny("llama", num_hidden_layers=8, max_position_embeddings=512, attn_implementation="eager")
    bare = attached(skeleton(model), QV)
    shape, deltas = shape_of_model(bare, attached_to(bare, "a").plan), deltas_of(bare, "a")
    short, long = (flops(shape, deltas, length, 1.0, replaces=False).forward for length in (1, 513))
    (without, _), (whole, _) = counted(attached(model, QV), 1), counted(model, 512)
    pytorch = whole / 4 / 512 - without / 4
    assert 2 * (long - short) == pytest.approx(pytorch, rel=0.01)


LLAMAS = {  # N of the body and of the head, as their configs give them
    "SmolLM2-135M": (dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                          num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True), 106.2e6, 28.3e6),
    "Llama-3.1-8B": (dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                          num_key_value_heads=8, vocab_size=128256), 6.98e9, 0.525e9),
}  # fmt: skip


@pytest.mark.parametrize(("name", "length", "rank", "targets", "labelled", "step", "again", "every"), [
    ("SmolLM2-135M", 64, 8, ("attn.q", "attn.v"), 1.0, 0.548e9, 0.765e9, 0.815e9),
    ("SmolLM2-135M", 64, 8, ("attn.q", "attn.v"), 0.5, 0.492e9, None, None),
    ("Llama-3.1-8B", 2048, 16, ("linear",), 1.0, 32.1e9, 46.6e9, 46.9e9),
    ("Llama-3.1-8B", 2048, 16, ("linear",), 0.5, 31.1e9, None, None),
])  # fmt: skip
def test_operations_of_known_models_worked_out_by_hand(
    name: str, length: int, rank: int, targets: tuple[str, ...], labelled: float, step: float,
    again: float | None, every: float | None,
) -> None:  # fmt: skip
    fields, body, head = LLAMAS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **fields))
    bare = attached(model, lk.LoRA(rank=rank, targets=targets))
    shape = shape_of_model(bare, attached_to(bare, "a").plan)
    assert (shape.body, shape.head) == (pytest.approx(body, rel=1e-3), pytest.approx(head, rel=1e-3))
    found = flops(shape, deltas_of(bare, "a"), length, labelled, replaces=False)
    assert found.step == pytest.approx(step, rel=2e-3)
    if again and every:
        assert found.step + found.recomputed == pytest.approx(again, rel=0.02)
        assert found.every_weight == pytest.approx(every, rel=2e-3)


def test_gpt3_is_the_papers_arithmetic() -> None:
    """Hu et al. 2021 count two bytes a number: 350 GB and 35 MB a checkpoint, 1.2 TB and 350 GB in training."""
    model = without_values("gpt3-175b", torch.float16)
    found = plan(model, QV, Train(max_length=2048), Lengths(), machine("v100", torch.float16), trained_bytes=2)
    adapter, every = found.bytes, found.every_weight
    assert found.parameters == 175_221_817_344 == pytest.approx(175_255.8e6, rel=3e-4)
    assert found.trainable == 2 * 96 * 2 * 4 * 12288 == 18_874_368
    assert every.file == adapter.weights == 350_443_634_688
    assert adapter.trained == 37_748_736 == 36 * 2**20
    assert every.file / adapter.trained == pytest.approx(9284, abs=1)  # "roughly 10,000 times"
    assert every.weights + 100 * adapter.trained == pytest.approx(354e9, rel=1e-3)  # a hundred models
    assert every.optimiser == 2 * every.weights
    moments = every.weights + every.optimiser, adapter.weights + adapter.optimiser
    assert moments == (1_051_330_904_064, pytest.approx(350.5e9, rel=1e-3))
    assert moments[0] / moments[1] == pytest.approx(3, rel=1e-3)  # so 2/3 are saved
    assert moments[0] < 1.2e12 < every.state == 4 * every.weights  # with gradients of two bytes, 1.40 TB
    assert not found.fits
    assert adapter.file == 2 * adapter.trained  # PEFT writes q and v of a fused layer as one block of twice the rank


def test_a_plan_leaves_the_model_as_it_is() -> None:
    model = attached(tiny("llama"), lk.LoRA(rank=2))
    before, mode = {key: value.clone() for key, value in model.state_dict().items()}, model.training
    first = planned(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training == mode
    lk.detach(model, "a")
    assert planned(model) == first


def test_the_forecast_is_json_and_a_table() -> None:
    found = planned(tiny("gpt2"), ALL)
    told = json.loads(json.dumps(found.to_json()))
    assert told["bytes"]["gradients"] == 4 * told["trainable"]
    assert (told["choice"]["forward_tokens"], told["fits"]) == (1024, True)
    assert f"lora trains {found.trainable:,}" in str(found)
    assert found.choice.why in str(found)
    assert found.step_seconds == pytest.approx(1024 * found.flops.step / 1e11)


def need(**fields: Any) -> Need:
    """A run that keeps 1000 bytes a token in 10 blocks, 40 of them as the input of each block."""
    shape = Shape(tuple("0123456789"), body=1e4, below=0, head=0, vocabulary=0, hidden=10, widest=0, queries=10,
                  bidirectional=False)  # fmt: skip
    return Need(**{"state": 10_000, "whole": 1000, "kept": Kept(1000, 0), "shape": shape, "itemsize": 4,
                   "labelled": 0.0, "logit_bytes": 0, **fields})  # fmt: skip


def wanted(memory: float, least: int = 256, most: int = 4096) -> Wanted:
    return Wanted(least, most, most, int(memory / SHARE) + 1, 0.3)


@pytest.mark.parametrize(("memory", "tokens", "checkpointing", "devices", "words"), [
    (10_000 + 4096 * 1000, 4096, "none", 1, "A whole batch of up to 4,096 tokens goes through in one pass"),
    (10_000 + 4095 * 1000, 4095, "none", 1, "A pass has 4,095 tokens (no more fit), so a batch of up to"),
    (10_000 + 512 * 1000, 512, "none", 1, "4,096 is divided into 8, which costs next to nothing."),
    (10_000 + 511 * 1000, 1022, "blocks", 1, "kept whole, only 511 tokens would go through in a pass"),
    (10_000 + 256 * 500, 256, "blocks", 1, "kept whole, not even an example of 256 tokens would go through"),
    (10_000 / 2 + 1000 + 256 * 500, 256, "blocks", 2, "Share the base out over 2 devices or more (FSDP2)"),
    (10_000 / 5 + 1000 + 256 * 500, 256, "blocks", 5, "at least 138.0 kB are needed"),
    (256 * 500, 256, "blocks", 0, "It does not fit on any number of devices: an example of 256 tokens"),
])  # fmt: skip
def test_the_largest_passes_with_the_least_recomputing_are_chosen(
    memory: float, tokens: int, checkpointing: str, devices: int, words: str
) -> None:
    found = choose(need(), wanted(memory))
    assert (found.forward_tokens, found.checkpointing, found.devices) == (tokens, checkpointing, devices)
    assert words in found.why
    assert (found.total <= wanted(memory).room) == (devices > 0)


def test_a_short_batch_is_not_cut_for_the_sake_of_larger_passes() -> None:
    assert choose(need(), wanted(10_000 + 128 * 1000, 64, 128)).checkpointing == "none"
    assert choose(need(), wanted(10_000 + 127 * 1000, 64, 128)).checkpointing == "blocks"


def test_what_is_asked_for_is_the_limit() -> None:
    model, few = tiny("llama"), {"forward_tokens": 200}
    found = planned(model, **few)
    assert (found.forward_tokens, found.checkpointing) == (200, "none")
    assert "A pass has 200 tokens (as many as asked), so a batch of up to 1,024 is divided into 6" in found.choice.why
    assert planned(model, forward_tokens=10).forward_tokens == 64  # an example is not divided
    found = planned(model, checkpointing="blocks")
    assert (found.forward_tokens, found.checkpointing) == (1024, "blocks")
    assert "as asked" in found.choice.why
    assert found.step_seconds > planned(model).step_seconds


def test_logits_are_held_chunk_by_chunk_and_labelled_ones_alone() -> None:
    shape = replace(need().shape, vocabulary=1000)
    assert need(shape=shape, labelled=0.5, logit_bytes=4).working(100, "none") == 50 * 1000 * 4 + 2 * 50 * 10 * 4
    assert need(shape=shape, labelled=1.0, logit_bytes=4).working(4096, "none") == 256 * 1000 * 4 + 2 * 4096 * 10 * 4


def test_an_adapted_head_holds_more_logits() -> None:
    plain, whole = (planned(tiny("llama", vocab_size=9000), method) for method in (ALL, lk.Full()))
    assert whole.choice.working > 3 * plain.choice.working


def test_a_prefix_takes_places_and_may_leave_none() -> None:
    with pytest.raises(BadMethod, match="puts 64 places into the sequence"):
        planned(tiny("llama"), lk.PrefixEmbedding(prefix=64))
    found = planned(tiny("llama"), lk.PrefixEmbedding(prefix=32))
    assert found.forward_tokens == 16 * 32
    assert found.flops.forward > 1.9 * planned(tiny("llama"), QV).flops.forward


def test_lengths_are_those_of_the_examples() -> None:
    examples = [SimpleNamespace(ids=range(n), start=start, label=None) for n, start in ((10, 5), (20, 0))]
    assert Lengths.of(examples) == Lengths(mean=15, longest=20, labelled=24 / 30)
    assert Lengths().within(512) == (512, 512)
    assert Lengths(mean=100, longest=300).within(200) == (100, 200)
    with pytest.raises(LorakitError, match=r"mean=0 must be at least 1; labelled=1.5 must be above 0, at most 1"):
        Lengths(mean=0, labelled=1.5)
    with pytest.raises(LorakitError, match=r"mean=100 must be at most longest=50"):
        Lengths(mean=100, longest=50)


def test_known_machines_are_slower_in_float32_and_old_ones_in_bfloat16_too() -> None:
    for name in SHEETS:
        slow, fast, usual = (machine(name, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16))
        assert slow.flops_per_second < fast.flops_per_second
        assert usual == (slow if name in ("t4", "v100") else fast)
    assert machine("H100").memory_bytes == 80 * 10**9


def test_the_machine_at_hand_is_measured() -> None:
    here = machine("cpu")
    assert here.device == "cpu"
    assert 10**8 < here.memory_bytes < 10**14
    assert 1e8 < here.flops_per_second < 1e15
    assert measured_flops("cpu", torch.float32) > 1e8
    assert usual_dtype("cpu") == torch.float32
    assert usual_dtype("h100") == torch.bfloat16


def test_a_machine_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    machine("cpu")
    monkeypatch.setattr(machine_module, "product", None)
    assert machine("cpu").flops_per_second == machine("cpu").flops_per_second


def test_processes_on_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = attached(tiny("llama"), QV), [SimpleNamespace(ids=range(10), start=5, label=None)]
    monkeypatch.setattr(planner, "machine_named", lambda *given: CPU)
    alone = plan_attached(model, "a", examples, Train()).machine.memory_bytes
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert plan_attached(model, "a", examples, Train()).machine.memory_bytes == alone - 3 * CPU.memory_bytes // 4
    gpu = replace(CPU, name="cuda", device="cuda")  # each process has its own
    monkeypatch.setattr(planner, "machine_named", lambda *given: gpu)
    assert plan_attached(model, "a", examples, Train()).machine.memory_bytes == CPU.memory_bytes


@pytest.mark.parametrize(("limit", "used", "left"), [("5000", "2000", 3500), ("1000", "2000", 0), ("max", "0", None)])
def test_a_containers_limit_counts(limit: str, used: str, left: int | None, tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    (tmp_path / "memory.stat").write_text("anon 10\ninactive_file 500\nactive_file 70\n")  # the first can be freed
    found = free_memory(tmp_path)
    assert found == left if left is not None else found > 10**8


def test_a_machine_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownName, match="no machine called 'h10'; did you mean"):
        machine("h10")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LorakitError, match="no CUDA device here; plan for cpu, or for a known device"):
        machine("cuda")

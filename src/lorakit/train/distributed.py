"""Several processes that train one adapter: how they begin, what each of them holds, and how they agree.

`torchrun` starts the processes and gives each its number, its rank. Each has the whole adapter, reads a share of every
batch, and adds its gradients to those of the others: so all of them take the same step. A base that fits is copied to
every process; one that does not is shared out, block by block (FSDP2). Alone, a process agrees with itself at no cost.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorakit.core.fingerprint import samples_kept
from lorakit.core.sites import ADAPTERS, sites_of
from lorakit.core.state import state_of
from lorakit.errors import BadModel, Interrupted, LorakitError
from lorakit.train.settings import LARGEST_SEED

Sharding = Literal["auto", "replicate", "shard"]
TIMEOUT_SECONDS = 600.0  # after which a process that does not answer counts as gone
_MOMENT_SECONDS = 3.0
_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class World:
    """The processes of a run, as one of them sees them. Whatever its methods do, all processes have to do together."""

    rank: int = 0
    size: int = 1
    sharded: bool = False  # whether the base is shared out

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def seed(self, seed: int) -> int:
        """A seed of this process's own; the first has the run's.

        >>> World(0, 2).seed(3), World(1, 2).seed(3) > LARGEST_SEED
        (3, True)
        """
        return seed + self.rank * (LARGEST_SEED + 1)

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """The numbers of each process, in the order of ranks."""
        if self.size == 1:
            return [list(numbers)]
        own = torch.tensor(numbers, dtype=torch.float64)
        rows = [torch.empty_like(own) for _ in range(self.size)]
        with answered():
            dist.all_gather(rows, own)
        return [row.tolist() for row in rows]

    def told(self, value: T, by: int = 0) -> T:
        """What the process `by` has for this value."""
        if self.size == 1:
            return value
        boxed = [value if self.rank == by else None]
        with answered():
            dist.broadcast_object_list(boxed, by, device=torch.device("cpu"))
        return boxed[0]  # type: ignore[return-value]

    def let_through(self, release: Callable[[], None]) -> None:
        """Let a Ctrl-C through that was held back: in all processes, if in one."""
        if self.size == 1:
            release()
        elif any(row[0] for row in self.gather([_raises_interrupt(release)])):
            raise KeyboardInterrupt

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make each gradient the sum over all processes, in one message; one that no process has stays away."""
        own = list(parameters)
        if self.size == 1:
            return
        present = torch.tensor([p.grad is not None for p in own], dtype=torch.float32, device=own[0].device)
        line = torch.cat([present, *((torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in own)])
        with answered():
            dist.all_reduce(line)
        held, *sums = line.split([len(own), *(p.numel() for p in own)])
        for parameter, has, found in zip(own, held.tolist(), sums, strict=True):
            parameter.grad = found.view_as(parameter).to(parameter.dtype) if has else None


ALONE = World()


def here() -> World:
    """The processes that this one belongs to; a world of one where there are no others."""
    if not dist.is_available() or not dist.is_initialized():
        return ALONE
    return World(dist.get_rank(), dist.get_world_size())


@contextmanager
def opened(timeout_seconds: float = TIMEOUT_SECONDS) -> Iterator[World]:
    """Join the processes that `torchrun` started, for the length of a `with` block; alone, it does nothing.

    SIGTERM, by which launchers end a process, is as Ctrl-C inside the block.

    Args:
        timeout_seconds: after which a process that does not answer counts as gone.

    Raises:
        LorakitError: this machine has fewer GPUs than processes.
        Interrupted: the other processes do not come.

    Example:
        ```python
        with opened() as world:
            for step in train.run(model, feed, settings, name="reviews", out="out/reviews"):
                ...
            if world.is_first:
                lk.save(model, "reviews", "out/reviews")
        ```
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield here()
        return
    with answered():
        dist.init_process_group(_backend(), timeout=timedelta(seconds=timeout_seconds))
    world = here()
    try:
        with _ended_like_interrupted(), _quiet(world):
            yield world
    except LorakitError as error:
        if not world.is_first:  # what is wrong everywhere is told by the first, and the launcher ends the others
            time.sleep(_MOMENT_SECONDS)
            if isinstance(error.__cause__, KeyboardInterrupt):  # all of them have stopped
                raise SystemExit(2) from error
        raise
    dist.destroy_process_group()


@contextmanager
def answered() -> Iterator[None]:
    """Say in a sentence that another process did not answer.

    Raises:
        Interrupted: it is gone, or took longer than the timeout.
    """
    try:
        yield
    except RuntimeError as error:
        raise lost() from error


def lost() -> Interrupted:
    """The error of a process whose companions are gone."""
    return Interrupted("another process of this run has ended or does not answer; what it said tells why")


def is_lost(error: BaseException) -> bool:
    """Whether an error out of a model says that another process did not answer.

    >>> is_lost(RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
    True
    """
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def join(model: Any, sharding: Sharding, fits: Callable[[], bool]) -> World:
    """The processes that are to train this model together; unless it is to be shared out, it is moved to a GPU.

    "auto" shares the base out where one of them says that the run does not fit on one device.

    Raises:
        BadModel: a base that is to be shared out and cannot be.
    """
    world = here()
    if world.size == 1:
        if sharding == "shard":
            _log.warning("sharding=shard has no other process to share the base with, so it stays whole")
        return world
    device = _device(model)
    wanted = sharding == "shard" or (sharding == "auto" and not fits())
    sharded = any(row[0] for row in world.gather([wanted]))
    if sharded:
        _blocks(model)  # refused before anything is changed
    else:
        model.to(device)
    return World(world.rank, world.size, sharded)


def share_out(model: Any) -> None:
    """Share the base's blocks out over all processes: each keeps a part, and has a block whole while it is at work.

    What is small (norms, biases, adapters) or outside of blocks (embeddings, head) stays whole in each process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device, blocks = _device(model), _blocks(model)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    parted = {id(p) for block in blocks for path, p in block.named_parameters() if _is_parted(path, p)}
    whole = {parameter for parameter in model.parameters() if id(parameter) not in parted}
    with samples_kept(model):
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        if model.base_model is not model:  # a root above the blocks lets one be gathered while another is at work
            fully_shard(model.base_model, mesh=mesh, ignored_params=whole)
    for tensor in (*whole, *model.buffers()):
        tensor.data = tensor.data.to(device)


def _raises_interrupt(release: Callable[[], None]) -> bool:
    try:
        release()
    except KeyboardInterrupt:
        return True
    return False


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model that can be shared out."""
    blocks = [model.get_submodule(site.path) for site in sites_of(model) if site.role == "block"]
    kind, methods = type(model).__name__, [attached.method for attached in state_of(model).attached.values()]
    if whole := next((method.name for method in methods if method.replaces_weights), None):
        raise BadModel(f"{kind} cannot be shared out: {whole} trains its weights, and each process would have those it "
                       "trains whole; take sharding=replicate, or another method")  # fmt: skip
    if not blocks:
        raise BadModel(f"{kind} cannot be shared out: it has no blocks that lorakit knows; take sharding=replicate")
    other = next((path for path, p in model.named_parameters() if type(p) is not nn.Parameter), None)
    if other is not None:
        raise BadModel(f"{kind} cannot be shared out: {other} is a {type(model.get_parameter(other)).__name__}, which "
                       "only its own library can divide; take sharding=replicate")  # fmt: skip
    return blocks


def _is_parted(path: str, parameter: Tensor) -> bool:
    """Whether a block's parameter is shared out: a matrix, or a quantised one's codes."""
    large = parameter.dim() > 1 or not parameter.is_floating_point()
    return large and ADAPTERS not in path.split(".")


def _device(model: Any) -> torch.device:
    """The GPU of this process, for a model that is not on one yet."""
    on_gpu = torch.cuda.is_available() and model.device.type == "cpu"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else model.device


def _backend() -> str:
    if not torch.cuda.is_available():
        return "gloo"
    local, gpus = int(os.environ.get("LOCAL_RANK", os.environ["RANK"])), torch.cuda.device_count()
    if local >= gpus:
        raise LorakitError(f"this is process {local + 1} on a machine with {gpus} GPUs; start as many processes as "
                           "GPUs (--nproc-per-node), or hide them all (CUDA_VISIBLE_DEVICES=)")  # fmt: skip
    torch.cuda.set_device(local)
    return "cpu:gloo,cuda:nccl"  # numbers to agree on go by gloo, which notices at once that a process is gone


@contextmanager
def _ended_like_interrupted() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _quiet(world: World) -> Iterator[None]:
    """The first process speaks for all, but of its own memory each speaks for itself."""
    loggers = {logging.getLogger("lorakit"): logging.ERROR, logging.getLogger("lorakit.train.memory"): logging.WARNING}
    before = {logger: logger.level for logger in loggers}
    for logger, level in loggers.items():
        logger.setLevel(logger.level if world.is_first else level)
    try:
        yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)

"""What a method does around an optimiser's step: for any training loop.

```python
for step, batch in enumerate(batches, 1):
    before_step(model, "a", step, steps)
    loss = model(**batch).loss
    added = penalty(model, "a")
    (loss if added is None else loss + added).backward()
    optimizer.step()
    after_step(model, "a", step, steps)
    optimizer.zero_grad()
```
`lorakit.train.run` calls these itself, and so does `lorakit.train.FollowMethod` in `transformers.Trainer`.
"""

from __future__ import annotations

from torch import Tensor, nn

from lorakit.core.delta import Delta
from lorakit.core.method import Method
from lorakit.core.state import attached_to, deltas_of


def before_step(model: nn.Module, name: str, step: int, steps: int) -> None:
    """Before the forward passes of optimiser step `step` (from 1) of `steps`: what a method draws or schedules."""
    method, deltas = _own(model, name)
    method.before_step(deltas, step, steps)


def penalty(model: nn.Module, name: str) -> Tensor | None:
    """What a method adds to the loss of a step; None for most."""
    method, deltas = _own(model, name)
    return method.penalty(deltas)


def after_step(model: nn.Module, name: str, step: int, steps: int) -> None:
    """After `optimizer.step()` and before `zero_grad()`: what a method learns from the gradients."""
    method, deltas = _own(model, name)
    method.after_step(deltas, step, steps)


def _own(model: nn.Module, name: str) -> tuple[Method, list[Delta]]:
    """An adapter's method, and the deltas that are the method's own."""
    method = attached_to(model, name).method
    return method, [delta for delta in deltas_of(model, name) if not delta.placement.is_replaced]

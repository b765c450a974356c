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
rest(model, "a")
```
`lorakit.train.run` calls these itself, and so does `lorakit.train.FollowMethod` in `transformers.Trainer`.
"""

from __future__ import annotations

from torch import Tensor, nn

from lorakit.core.state import attached_to, own_deltas_of, state_or_new


def before_step(model: nn.Module, name: str, step: int, steps: int) -> None:
    """Before the forward passes of optimiser step `step` (from 1) of `steps`: what a method draws or schedules."""
    attached_to(model, name).method.before_step(own_deltas_of(model, name), step, steps)


def penalty(model: nn.Module, name: str) -> Tensor | None:
    """What a method adds to the loss of a step; None for most."""
    return attached_to(model, name).method.penalty(own_deltas_of(model, name))


def after_step(model: nn.Module, name: str, step: int, steps: int) -> None:
    """After `optimizer.step()` and before `zero_grad()`: what a method learns from the gradients."""
    attached_to(model, name).method.after_step(own_deltas_of(model, name), step, steps)


def rest(model: nn.Module, name: str) -> None:
    """When training pauses or ends, also by an error: what a method drew for a step is forgotten.

    An adapter that has been detached since has nothing to forget.
    """
    if name in state_or_new(model).attached:
        attached_to(model, name).method.rest(own_deltas_of(model, name))

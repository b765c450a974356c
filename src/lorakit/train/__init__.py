"""Train an adapter: a generator of steps, checkpoints that resume to the same bits, progress and a loss curve.

`lorakit.train.callback` has `SaveAdapter` for `transformers.Trainer`.
"""

from lorakit.train.curve import draw
from lorakit.train.feed import Feed
from lorakit.train.head import heads
from lorakit.train.loop import run
from lorakit.train.progress import show
from lorakit.train.settings import Step, Train

__all__ = ["Feed", "Step", "Train", "draw", "heads", "run", "show"]

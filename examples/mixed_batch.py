"""One batch in which every row runs an adapter of its own.

    python examples/mixed_batch.py                      # a tiny random model: offline, in seconds
    python examples/mixed_batch.py --base smollm2-135m

Two adapters learn the same reviews with other words for an answer; then neighbouring rows use the base and both.
"""

from __future__ import annotations

from _setting import GERMAN, LABELS, base, options, reviews

import lorakit as lk
from lorakit import train
from lorakit.data import collate, encode, order
from lorakit.evaluate import generate_texts

ANSWERS = {"english": LABELS, "german": GERMAN}


def main() -> None:
    """Train two adapters, then use both and the base in one batch."""
    arguments = options(__doc__).parse_args()
    model, tokenizer = base(arguments.base)
    for name, labels in ANSWERS.items():
        lk.attach(model, lk.LoRA(rank=8, alpha=16, targets="linear"), name=name)
        feed = train.Feed(encode(reviews(labels), tokenizer, 64), tokenizer.pad_token_id, collate, order)
        *_, last = train.run(model, feed, train.Train(steps=arguments.steps, learning_rate=2e-3), name=name)
        lk.save(model, name, arguments.out / name)
        print(f"{name}: loss {last.loss:.3f} after {last.step} steps")

    rows = [None, "english", "german", "german", "english"]
    contexts = [reviews()[number].context for number in (0, 0, 0, -1, -1)]
    with lk.use(model, rows):
        answers = generate_texts(model, tokenizer, contexts, max_new_tokens=6, batch_size=len(rows))
    for name, context, answer in zip(rows, contexts, answers, strict=True):
        print(f"{name or 'base':>8} | {' '.join(context.split())} {answer.strip()!r}")


if __name__ == "__main__":
    main()

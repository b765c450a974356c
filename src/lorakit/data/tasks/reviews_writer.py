"""The sentences of `reviews` turned round: write a review of a given sentiment."""

from __future__ import annotations

from lorakit.data.declaration import Data, Source
from lorakit.data.tasks import _movie_reviews


def source(data: Data) -> Source:
    """Write a negative or a positive review; the same texts as in `reviews` are held out."""
    usual = {"template": "Write a {sentiment} movie review.\nReview:", "target": "text"}
    return _movie_reviews.source(data, "rotten_tomatoes", **usual, test_share=0.13)

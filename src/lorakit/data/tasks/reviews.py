"""8,530 one-sentence film reviews from Rotten Tomatoes (Pang and Lee 2005), negative or positive."""

from __future__ import annotations

from lorakit.data.declaration import Data, Source
from lorakit.data.tasks import _movie_reviews


def source(data: Data) -> Source:
    """Say whether a review is negative or positive; 13 % of the texts are held out."""
    usual = {"template": "Review: {text}\nSentiment:", "label": "label", "labels": _movie_reviews.LABELS}
    return _movie_reviews.source(data, "rotten_tomatoes", **usual, test_share=0.13)

"""25,000 film reviews of several sentences from IMDB (Maas et al. 2011), negative or positive."""

from __future__ import annotations

from lorakit.data.declaration import Data, Source
from lorakit.data.tasks import _movie_reviews


def source(data: Data) -> Source:
    """Say whether a review is negative or positive; a tenth of the texts is held out."""
    usual = {"template": "Review: {text}\nSentiment:", "label": "label", "labels": _movie_reviews.LABELS}
    return _movie_reviews.source(data, "imdb", **usual, test_share=0.1)

"""What a hub refuses, and why it cannot be reached, as one sentence that never holds the token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lorakit.errors import LorakitError, UnknownName

LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


@contextmanager
def asking(api: Any, repo: str, revision: str | None) -> Iterator[None]:
    """Say in a sentence what the hub refuses, or that it cannot be reached."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        yield
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        if isinstance(error, UnicodeEncodeError) or "Bearer" in str(error):  # which quotes the token
            raise LorakitError(f"your token has characters that none can have; {LOGIN}") from None
        cause: BaseException = error
        while not isinstance(cause, HfHubHTTPError) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, HfHubHTTPError):
            raise _refused(cause, api.endpoint, repo, revision) from error
        raise _failed(cause, api.endpoint, repo) from error


def _refused(error: Any, endpoint: str, repo: str, revision: str | None) -> LorakitError:
    """What the hub answered, in our words."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, RevisionNotFoundError):
        return UnknownName(f"{repo} has no revision {revision!r}; name one of its branches, tags or commits")
    if isinstance(error, GatedRepoError):
        return LorakitError(f"{repo} is gated: ask for access at {endpoint}/{repo}, and {LOGIN}")
    if isinstance(error, RepositoryNotFoundError):
        return UnknownName(f"{endpoint} has no repository {repo} that you may read; for a private one, {LOGIN}")
    status, reason = error.response.status_code, _one_line(error.server_message or "no reason given")
    if status == 401:
        return LorakitError(f"{endpoint} does not know your token; {LOGIN}")
    if status == 403:
        return LorakitError(f"your token may not do this to {repo} ({reason}); give one that may: {LOGIN}")
    return LorakitError(f"{endpoint} answered {status} for {repo}: {reason}")


def _failed(error: BaseException, endpoint: str, repo: str) -> LorakitError:
    """No answer: no network, a broken connection, or something that the client refuses to send."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return LorakitError(f"{endpoint} may not be asked for {repo}: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set")
    what = "is refused" if isinstance(error, ValueError) else f"cannot be exchanged with {endpoint}"
    return LorakitError(f"{repo} {what}: {_one_line(error) or type(error).__name__}")


def _one_line(text: object) -> str:
    return " ".join(str(text).split()).rstrip(".")

"""What goes wrong with a model hub, said in one message with the remedy."""

from __future__ import annotations

import errno
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from huggingface_hub import constants
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

if TYPE_CHECKING:
    from collections.abc import Mapping

UNREACHABLE = (HTTPError, OSError)
"""What the hub library raises where there is no answer; answers are `HfHubHTTPError`."""

FAILURES = (HFValidationError, *UNREACHABLE)
"""All that `explain` explains."""

_TOKEN = "log in with `hf auth login` or set HF_TOKEN"  # noqa: S105


class HubError(ValueError):
    """A download cannot begin, or cannot go on."""


class NoConnectionError(HubError):
    """The hub does not answer, or must not be asked."""


def explain(
    error: Exception, repository: str, revision: str | None = None, *, nearby: str = ""
) -> HubError:
    """The error to raise for one of the hub library's, about the model `repository`.

    `nearby` says what was looked for before the hub was asked, as "no such file here, and ".
    """
    if isinstance(error, HFValidationError):
        return HubError(f"{repository}: {error}")
    if isinstance(error, HfHubHTTPError):
        return HubError(f"{repository}: {_refusal(error, repository, revision, nearby)}")
    if isinstance(error, OfflineModeIsEnabled):
        return NoConnectionError(
            f"{repository}: HF_HUB_OFFLINE is set, so nothing is downloaded; unset it to go online"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return HubError(
            f"{repository}: no room is left in {constants.HF_HUB_CACHE}; free some and run the "
            "same command again, it goes on where it stopped"
        )
    if isinstance(error, OSError) and error.filename is not None:
        return HubError(f"{error.filename}: {error.strerror}; make it writable, or set HF_HOME")
    return NoConnectionError(
        f"{repository}: cannot reach {constants.ENDPOINT} ({describe(error)}); check the "
        "connection and run the same command again, what is there is kept"
    )


def describe(error: Exception) -> str:
    """The first line of an error's text, or what kind it is."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def status_of(error: HfHubHTTPError) -> int:
    """The HTTP status of an answer, 0 where it has none."""
    return int(error.response.status_code) if error.response is not None else 0


def asked_wait(error: HfHubHTTPError) -> int | None:
    """Seconds after which the hub wants to be asked again, None where it does not say."""
    headers: Mapping[str, str] = error.response.headers if error.response is not None else {}
    limit = parse_ratelimit_headers(headers)
    if status_of(error) == 429 and limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds
    value = headers.get("Retry-After", "").strip()
    if value.isdigit():
        return int(value)
    try:
        return max(0, round((parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()))
    except (ValueError, TypeError):
        return None


def _refusal(error: HfHubHTTPError, repository: str, revision: str | None, nearby: str) -> str:
    """What the hub answered, and what to do about it."""
    endpoint, status = constants.ENDPOINT, status_of(error)
    if isinstance(error, GatedRepoError):
        return (
            f"access must be granted first; accept the terms on {endpoint}/{repository}, "
            f"then {_TOKEN}"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"no revision {revision!r}; leave out @{revision} for the newest"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{nearby}no such model on {endpoint}; check the spelling, and for a private model "
            f"{_TOKEN}"
        )
    if isinstance(error, EntryNotFoundError):
        return "a file is no longer in the repository; run the same command again"
    if status == 401:
        return f"{endpoint} does not accept the token; {_TOKEN} to a valid one"
    if status == 403:
        return f"{endpoint} forbids the download; use a token that may read it: {_TOKEN}"
    kept = "what is there is kept"
    if status == 429:
        wait = asked_wait(error)
        when = "later" if wait is None else f"in {_duration(wait)}"
        return f"{endpoint} was asked too often; try again {when}, {kept}"
    return f"{endpoint} answered with status {status or 'no'}; try again later, {kept}"


def _duration(seconds: int) -> str:
    return f"{seconds} s" if seconds < 120 else f"{-(-seconds // 60)} minutes"

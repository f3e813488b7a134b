"""When to ask a hub again after a failure, and how long to wait before."""

from __future__ import annotations

from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

from localds.hub.errors import asked_wait, status_of

RETRIES = 4
"""Failures in a row after which there is no further attempt."""

LONGEST_WAIT = 60
"""Seconds that the hub may ask to wait; for more, a person is told instead."""

_PASSING = (408, 429, 500, 502, 503, 504)


def pause(error: Exception | None, failures: int) -> float | None:
    """Seconds to wait after that many `failures` in a row, None where to give up.

    `error` is the last failure, None for an answer that broke off. Refusals and trouble on this
    machine do not pass by waiting; a busy hub and a broken connection do.
    """
    if failures > RETRIES or (error is not None and not isinstance(error, HTTPError)):
        return None
    if isinstance(error, HfHubHTTPError):
        if status_of(error) not in _PASSING:
            return None
        asked = asked_wait(error)
        if asked is not None:
            return asked + 1.0 if asked <= LONGEST_WAIT else None
    return 2.0 ** (failures - 1)

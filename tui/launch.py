"""What the command line asks of the app."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Launch:
    """`model` is a name or file, None for the default one.

    `given` are settings by their keys in `tui.settings`, only those that were given; `sampling`
    what goes to `Session.generate` and is no setting.
    """

    model: str | None = None
    given: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)

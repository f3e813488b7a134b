"""What the store keeps: conversations, their messages, and the files attached to these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

Role = Literal["user", "assistant"]


@dataclass(frozen=True, slots=True)
class Attachment:
    """A text file that belongs to a message; `tokens` is its length in the model's tokens."""

    name: str
    text: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Message:
    """One message, a node of its conversation's tree; `parent` is None for a first message.

    `finish` is "" while the message is being written, or after a crash; else "stop", "length",
    "context", "stopped" (by the user) or "error: ...". `stats` holds the figures of a reply.
    `created` is in seconds since 1970, `thinking_seconds` is how long the model thought.
    """

    id: int
    conversation: int
    parent: int | None
    role: Role
    content: str
    thinking: str
    thinking_seconds: float
    attachments: tuple[Attachment, ...]
    finish: str
    model: str
    stats: Mapping[str, float]
    created: float


@dataclass(frozen=True, slots=True)
class Conversation:
    """One chat. `leaf` is the last message of the current branch; None where that is empty.

    `created`, and `updated` (when a message was last added), are in seconds since 1970.
    """

    id: int
    title: str
    model: str
    settings: Mapping[str, Any]
    leaf: int | None
    created: float
    updated: float

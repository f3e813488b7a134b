"""Messages of the store as entries of the transcript."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tui.widgets.entry import Entry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tui.store.records import Message

_NOTES = {
    "stop": "",
    "length": "cut at the token limit; Ctrl+S goes on",
    "context": "the context is full; a larger one can be set in the settings",
    "stopped": "stopped; Ctrl+S goes on",
    "": "this reply was not finished; Ctrl+S goes on",
}


def entry_of(message: Message, versions: Sequence[int], *, unfolded: bool) -> Entry:
    """A message to show; `versions` are the ids of those that stand in the same place."""
    entry = Entry(
        message.id,
        message.role,
        "You" if message.role == "user" else message.model or "Assistant",
        message.content,
        thinking=message.thinking,
        thinking_seconds=message.thinking_seconds,
        branch=(versions.index(message.id) + 1, len(versions)),
        attachments=[f"{a.name} · {a.tokens} tokens" for a in message.attachments],
        note="" if message.role == "user" else finish_note(message.finish),
        detail="" if message.role == "user" else speed(message),
    )
    entry.unfolded = unfolded
    return entry


def finish_note(finish: str) -> str:
    """What to tell of the way a reply ended."""
    return finish if finish.startswith("error") else _NOTES.get(finish, "")


def speed(message: Message) -> str:
    """How fast a reply was made; empty where that is not known."""
    tokens = message.stats.get("generated_tokens", 0)
    seconds = message.stats.get("decode_seconds", 0.0)
    return f"{tokens / seconds:.1f} tokens/s" if tokens and seconds else ""

"""Conversations as text: Markdown to read, JSON to bring to another machine and back."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from tui.fence import fenced
from tui.store.document import FORMAT, VERSION, parse_document
from tui.store.error import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tui.store.conversations import ConversationStore
    from tui.store.records import Conversation, Message

_FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})(.*)")


def to_markdown(conversation: Conversation, messages: Sequence[Message]) -> str:
    """The messages under their roles, with the title and the system prompt before them."""
    blocks = [f"# {_one_line(conversation.title) or 'Untitled chat'}"]
    system = conversation.settings.get("system")
    if system:
        blocks += ["## System", _closed(str(system))]
    for message in messages:
        blocks += _message_blocks(message)
    return "\n\n".join(block for block in blocks if block) + "\n"


def to_json(store: ConversationStore, conversation_id: int) -> str:
    """The whole conversation with all its branches; messages are numbered from 1.

    Raises `StoreError` for a conversation that is gone or damaged.
    """
    conversation, messages = store.tree(conversation_id)
    try:
        document = _document(conversation, messages)
    except KeyError as error:
        raise StoreError(
            f"exporting a chat: its message {error} is missing; the database is damaged"
        ) from None
    return json.dumps(document, ensure_ascii=False, indent=1) + "\n"


def from_json(store: ConversationStore, text: str) -> Conversation:
    """Add the conversation that `to_json` wrote, under new ids.

    Raises `StoreError`, and leaves the store as it was, where anything in the text is wrong.
    """
    return store.insert(*parse_document(text))


def _document(conversation: Conversation, messages: Sequence[Message]) -> dict[str, Any]:
    numbers: dict[int | None, int | None] = {None: None}
    numbers |= {message.id: number for number, message in enumerate(messages, 1)}
    return {
        "format": FORMAT,
        "version": VERSION,
        "title": conversation.title,
        "model": conversation.model,
        "settings": dict(conversation.settings),
        "created": conversation.created,
        "updated": conversation.updated,
        "leaf": numbers[conversation.leaf],
        "messages": [_message_document(m, numbers) for m in messages],
    }


def _message_document(message: Message, numbers: dict[int | None, int | None]) -> dict[str, Any]:
    return {
        "id": numbers[message.id],
        "parent": numbers[message.parent],
        "role": message.role,
        "content": message.content,
        "thinking": message.thinking,
        "thinking_seconds": message.thinking_seconds,
        "attachments": [
            {"name": a.name, "text": a.text, "tokens": a.tokens} for a in message.attachments
        ],
        "finish": message.finish,
        "model": message.model,
        "stats": dict(message.stats),
        "created": message.created,
    }


def _message_blocks(message: Message) -> Iterator[str]:
    yield f"## {message.role.capitalize()}"
    for attachment in message.attachments:
        yield f"Attached: {_one_line(attachment.name)}"
        yield fenced(attachment.text)
    if message.thinking:
        yield _details(message)
    yield _closed(message.content)


def _details(message: Message) -> str:
    """The thinking part, folded. A quotation, so that nothing begun in it goes on after it."""
    seconds = f" ({message.thinking_seconds:.0f} s)" if message.thinking_seconds else ""
    harmless = re.sub("</(?=details)", "&lt;/", message.thinking, flags=re.IGNORECASE)
    quoted = "\n".join(f"> {line}".rstrip() for line in harmless.split("\n"))
    return f"<details>\n<summary>Thinking{seconds}</summary>\n\n{quoted}\n\n</details>"


def _closed(text: str) -> str:
    """The text, with the end of a code block that was left open, as in a reply cut short."""
    fence = ""
    for line in text.split("\n"):
        match = _FENCE.match(line)
        if not match:
            continue
        if not fence:
            fence = match[1]
        elif match[1].startswith(fence) and not match[2].strip():
            fence = ""
    return f"{text}\n{fence}" if fence else text


def _one_line(text: str) -> str:
    return " ".join(text.split())

"""The JSON document of a conversation: every part is checked before any of it is used."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, get_args

from tui.store.error import StoreError
from tui.store.records import Attachment, Conversation, Message, Role

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT, VERSION = "localds-chat", 1

_MAX_INTEGER = 2**63 - 1
_CONVERSATION = frozenset(
    {"format", "version", "title", "model", "settings", "created", "updated", "leaf", "messages"}
)
_MESSAGE = frozenset(Message.__slots__) - {"conversation"}
_ATTACHMENT = frozenset(Attachment.__slots__)


def parse_document(text: str) -> tuple[Conversation, list[Message]]:
    """The records that the document describes, numbered as there, parents before their children.

    Raises `StoreError` naming the first thing that is wrong.
    """
    document = _object(_parse(text), "the document")
    if document.get("format") != FORMAT:
        raise _wrong(f'"format" is not "{FORMAT}"; give a file that localds exported as JSON')
    if _integer(document.get("version"), '"version"') != VERSION:
        raise _wrong(f'"version" is not {VERSION}; it was written by a newer localds, so update it')
    _check_keys(document, _CONVERSATION, "the document")
    messages = _messages(_list(document["messages"], '"messages"'))
    leaf = _integer_or_none(document["leaf"], '"leaf"')
    if leaf is not None and leaf not in {message.id for message in messages}:
        raise _wrong(f'"leaf" names message {leaf}, which is not there')
    conversation = Conversation(
        0,
        _text(document["title"], '"title"'),
        _text(document["model"], '"model"'),
        _object(document["settings"], '"settings"'),
        leaf,
        _number(document["created"], '"created"'),
        _number(document["updated"], '"updated"'),
    )
    return conversation, messages


def _parse(text: str) -> object:
    try:
        return json.loads(text)
    except RecursionError:
        raise _wrong("it is nested too deeply") from None
    except ValueError as error:
        raise _wrong(f"it is not JSON ({error})") from None


def _messages(documents: list[Any]) -> list[Message]:
    messages: list[Message] = []
    known: set[int] = set()
    for place, document in enumerate(documents, 1):
        message = _message(document, f"message {place} of {len(documents)}")
        if message.id in known:
            raise _wrong(f"there are two messages with the id {message.id}")
        # With this rule there are no cycles.
        if message.parent is not None and message.parent not in known:
            raise _wrong(
                f"the parent of message {message.id} is {message.parent}, which is not before it"
            )
        known.add(message.id)
        messages.append(message)
    return messages


def _message(value: object, where: str) -> Message:
    document = _object(value, where)
    _check_keys(document, _MESSAGE, where)
    stats = _object(document["stats"], f'"stats" of {where}')
    for name, figure in stats.items():
        _number(figure, f"the figure {name[:80]!r} of {where}")
    attachments = _list(document["attachments"], f'"attachments" of {where}')
    return Message(
        id=_integer(document["id"], f'"id" of {where}'),
        conversation=0,
        parent=_integer_or_none(document["parent"], f'"parent" of {where}'),
        role=_role(document["role"], where),
        content=_text(document["content"], f'"content" of {where}'),
        thinking=_text(document["thinking"], f'"thinking" of {where}'),
        thinking_seconds=_number(document["thinking_seconds"], f'"thinking_seconds" of {where}'),
        attachments=tuple(_attachment(a, f"an attachment of {where}") for a in attachments),
        finish=_text(document["finish"], f'"finish" of {where}'),
        model=_text(document["model"], f'"model" of {where}'),
        stats=stats,
        created=_number(document["created"], f'"created" of {where}'),
    )


def _attachment(value: object, where: str) -> Attachment:
    document = _object(value, where)
    _check_keys(document, _ATTACHMENT, where)
    return Attachment(
        name=_text(document["name"], f'"name" of {where}'),
        text=_text(document["text"], f'"text" of {where}'),
        tokens=_integer(document["tokens"], f'"tokens" of {where}'),
    )


def _check_keys(document: Mapping[str, Any], keys: frozenset[str], where: str) -> None:
    for key in sorted(keys - document.keys()):
        raise _wrong(f'"{key}" is missing in {where}')
    for key in sorted(document.keys() - keys):
        raise _wrong(f"{key[:80]!r} in {where} is unknown")


def _role(value: object, where: str) -> Role:
    for role in get_args(Role):
        if value == role:
            return role  # type: ignore[no-any-return]
    raise _expected('"user" or "assistant"', value, f'"role" of {where}')


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _expected("an object", value, where)
    return value


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise _expected("a list", value, where)
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise _expected("a text", value, where)
    return value


def _integer(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_INTEGER:
        raise _expected("a whole number of at least 0", value, where)
    return value


def _integer_or_none(value: object, where: str) -> int | None:
    return None if value is None else _integer(value, where)


def _number(value: object, where: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    raise _expected("a finite number", value, where)


def _expected(what: str, value: object, where: str) -> StoreError:
    kinds: dict[type, str] = {dict: "an object", list: "a list", str: "a text"}
    found = kinds.get(type(value)) or json.dumps(value)[:80]
    return _wrong(f"{where} is {found}; it must be {what}")


def _wrong(reason: str) -> StoreError:
    return StoreError(f"importing a chat: {reason}")

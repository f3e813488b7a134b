"""What one record of a data file says, whichever of the usual forms it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from localds.finetune.data.errors import RecordError
from localds.finetune.data.messages import Message, read_messages, read_turns

FORMS = (
    '{"messages": [...]}, {"conversations": [...]}, {"prompt": ..., "completion": ...}, '
    '{"instruction": ..., "output": ...} or {"text": ...}'
)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order, and the tools that the model was told of."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """A text, and how it goes on to its end."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Text:
    """A whole text. `cut` says that one too long is cut into pieces, so that nothing is lost."""

    text: str
    cut: bool = False


Record = Conversation | Completion | Text


def read_record(value: object) -> Record:
    """What a JSON value says. Other keys than those of its form mean nothing.

    Raises `RecordError`.
    """
    if not isinstance(value, dict):
        raise RecordError(f"a record is an object, not {_kind(value)}: {FORMS}")
    if "messages" in value:
        return Conversation(read_messages(value["messages"], "messages"), _tools(value))
    if "conversations" in value:
        return Conversation(read_turns(value["conversations"], value.get("system")), _tools(value))
    if "prompt" in value and "completion" in value:
        return _completion(value)
    if "instruction" in value and "output" in value:
        return _instruction(value)
    if "text" in value:
        return Text(_text(value, "text"))
    there = ", ".join(map(repr, list(value)[:6])) or "nothing"
    raise RecordError(f"the record has {there}; what can be read is {FORMS}")


def _completion(value: dict[str, Any]) -> Record:
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Completion(prompt, _text(value, "completion"))
    if isinstance(prompt, str) or isinstance(completion, str):
        raise RecordError("prompt and completion are both texts or both lists of messages")
    # Only what follows the prompt is to be learned.
    asked = (message.untrained() for message in read_messages(prompt, "prompt"))
    return Conversation((*asked, *read_messages(completion, "completion")), _tools(value))


def _instruction(value: dict[str, Any]) -> Conversation:
    """Alpaca's form, as a conversation."""
    more = value.get("input")
    if more is not None and not isinstance(more, str):
        raise RecordError(f"input is {_kind(more)}; it must be a text")
    asked = _text(value, "instruction") + (f"\n\n{more}" if more else "")
    messages = [Message("user", asked), Message("assistant", _text(value, "output"))]
    if value.get("system"):
        messages.insert(0, Message("system", _text(value, "system")))
    return Conversation(tuple(messages))


def _text(value: dict[str, Any], key: str) -> str:
    text = value[key]
    if not isinstance(text, str):
        raise RecordError(f"{key} is {_kind(text)}; it must be a text")
    if not text.strip():
        raise RecordError(f"{key} is empty")
    return text


def _tools(value: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    tools = value.get("tools")
    if tools is None:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RecordError("tools must be a list of objects")
    return tuple(tools)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")

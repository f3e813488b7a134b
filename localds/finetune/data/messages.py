"""Messages of a conversation, in OpenAI's form or ShareGPT's, brought to one form."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Final

from localds.finetune.data.errors import RecordError
from localds.thinking import ThinkingSplitter

_ROLES: Final = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_SPEAKERS: Final = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True, slots=True)
class Message:
    """`reasoning` is what an assistant thought before `content`; `trained` whether it counts.

    `calls` are an assistant's tool calls ({"type": "function", "function": {"name", "arguments"}}),
    `more` further keys that a template may want ("name", "tool_call_id").
    """

    role: str
    content: str
    reasoning: str = ""
    calls: tuple[dict[str, Any], ...] = ()
    trained: bool = True
    more: dict[str, Any] = field(default_factory=dict)

    def untrained(self) -> Message:
        """The same message, of which nothing is to be learned."""
        return replace(self, trained=False)


def read_messages(value: object, where: str) -> tuple[Message, ...]:
    """OpenAI's form: [{"role", "content", ...}]. Raises `RecordError`."""
    return tuple(
        _message(_object(item, f"{where}[{i}]"), f"{where}[{i}]")
        for i, item in enumerate(_list(value, where))
    )


def read_turns(value: object, system: object = None) -> tuple[Message, ...]:
    """ShareGPT's form: [{"from", "value"}], with a system prompt beside it or within.

    Raises `RecordError`.
    """
    messages = []
    if system:
        messages.append(Message("system", _content(system, "system")))
    for i, item in enumerate(_list(value, "conversations")):
        where = f"conversations[{i}]"
        turn = _object(item, where)
        if "from" not in turn and "role" in turn:
            messages.append(_message(turn, where))
            continue
        role = _role(turn.get("from"), _SPEAKERS, f"{where}.from")
        said = _content(turn.get("value"), f"{where}.value")
        messages.append(_with_thinking(Message(role, said, trained=_trained(turn, where)), where))
    return tuple(messages)


def _message(value: dict[str, Any], where: str) -> Message:
    role = _role(value.get("role"), _ROLES, f"{where}.role")
    more: dict[str, Any] = {key: value[key] for key in ("name", "tool_call_id") if key in value}
    if role != "assistant":
        return Message(role, _content(value.get("content"), f"{where}.content"), more=more)
    calls = _calls(value.get("tool_calls"), f"{where}.tool_calls")
    said = value.get("content")
    content = "" if calls and said is None else _content(said, f"{where}.content")
    message = Message(role, content, "", calls, _trained(value, where), more)
    thought = value.get("reasoning_content") or value.get("reasoning")
    if thought is None or thought == "":
        return _with_thinking(message, where)
    return replace(message, reasoning=_content(thought, f"{where}.reasoning").strip())


def _with_thinking(message: Message, where: str) -> Message:
    """An assistant's message with what it thought, in tags before the answer, told apart."""
    if message.role != "assistant":
        return message
    splitter = ThinkingSplitter()
    parts = [*splitter.push(message.content), *splitter.flush()]
    thought = "".join(text for kind, text in parts if kind == "thinking").strip()
    answer = "".join(text for kind, text in parts if kind == "answer")
    if answer == message.content:
        return message
    answer = answer.lstrip()
    if not answer and not message.calls:
        raise RecordError(f"{where}: a thinking part without an answer after it")
    return replace(message, content=answer, reasoning=thought)


def _content(value: object, where: str) -> str:
    """A text, or OpenAI's list of text parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RecordError(f"{where} is {'missing' if value is None else 'no text'}")
    texts = []
    for part in value:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise RecordError(f"{where} holds something other than text; models here read text")
        texts.append(text)
    return "".join(texts)


def _calls(value: object, where: str) -> tuple[dict[str, Any], ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise RecordError(f"{where} must be a list")
    calls = []
    for i, item in enumerate(value):
        call = _object(item, f"{where}[{i}]")
        function = _object(call.get("function", call), f"{where}[{i}].function")
        name, arguments = function.get("name"), function.get("arguments", {})
        if not isinstance(name, str) or not name:
            raise RecordError(f"{where}[{i}] names no function")
        if not isinstance(arguments, str | dict):
            raise RecordError(f"{where}[{i}].arguments must be an object, or the text of one")
        known = {"name": name, "arguments": arguments}
        identity = {"id": call["id"]} if "id" in call else {}
        calls.append({**identity, "type": "function", "function": known})
    return tuple(calls)


def _trained(value: dict[str, Any], where: str) -> bool:
    weight = value.get("weight")
    if weight is None:
        return True
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RecordError(f"{where}.weight is {weight!r}; it must be 0 or 1")
    return bool(weight)


def _role(value: object, known: dict[str, str], where: str) -> str:
    role = known.get(value) if isinstance(value, str) else None
    if role is None:
        raise RecordError(f"{where} is {value!r}; it must be one of {', '.join(known)}")
    return role


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise RecordError(f"{where} must be a list with at least one message")
    return value


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RecordError(f"{where} must be an object")
    return value

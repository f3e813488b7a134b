"""An assistant's turn as text: what the model is asked with, and what it then has to write."""

from __future__ import annotations

import re
from typing import Final

from localds.finetune.data.errors import RecordError
from localds.thinking import THINK_TAGS, Reply

_OPEN, _CLOSE = THINK_TAGS[0]
_OPENED = re.compile(rf"{_OPEN}\s*\Z")
_CLOSED = re.compile(rf"(?:{_OPEN}\s*)?{_CLOSE}(\s*)\Z")
_OPENS: Final = re.compile(rf"\s*{_OPEN}\s*")
_CLOSES: Final = re.compile(rf"\s*{_CLOSE}")
_EMPTY: Final = re.compile(rf"(\s*{_OPEN})(\s*)({_CLOSE})")


def refuses_thinking(prompt: str) -> bool:
    """Whether the prompt has closed the thinking part before it began."""
    return _CLOSED.search(prompt) is not None


def reply_in(prompt: str, full: str, reasoning: str) -> str:
    """What follows `prompt` in a conversation rendered in `full`, with `reasoning` before it.

    Templates leave out what was thought, or open the thinking part in the prompt only: then it is
    written here as `Session.generate` does. Raises `RecordError` where the two do not fit together.
    """
    opened = _OPENED.search(prompt)
    if opened:
        return _reply_inside(prompt, full, reasoning, opened)
    closed = _CLOSED.search(prompt)
    if closed:
        return _reply_behind(prompt, full, reasoning, closed)
    rest = _after(prompt, full)
    if reasoning in rest:
        return rest
    empty = _EMPTY.match(rest)
    if empty:
        line_end = "\n" if "\n" in empty[2] else ""
        return f"{empty[1]}{line_end}{reasoning}{line_end}{empty[3]}{rest[empty.end() :]}"
    return _written(reasoning, rest, opened=None)


def _reply_inside(prompt: str, full: str, reasoning: str, opened: re.Match[str]) -> str:
    """The reply where the prompt has opened the thinking part."""
    rest = _after(prompt[: opened.start()], full)
    begun = _OPENS.match(rest)
    if begun:
        rest = rest[begun.end() :]
        if _CLOSE in rest and reasoning in rest:
            return rest
    closed = _CLOSES.match(rest)
    if not closed:
        return _written(reasoning, rest, opened=opened[0])
    line_end = "\n" if reasoning and opened[0].endswith("\n") else ""
    return f"{reasoning}{line_end}{rest[closed.end() - len(_CLOSE) :]}"


def _reply_behind(prompt: str, full: str, reasoning: str, closed: re.Match[str]) -> str:
    """The reply where the prompt has closed the thinking part, so that there is only an answer."""
    if reasoning:
        raise RecordError("the model's chat template has no place for reasoning")
    if full.startswith(prompt):
        return full[len(prompt) :]
    rest = _after(prompt[: closed.start()], full)
    part = _EMPTY.match(rest) or _CLOSES.match(rest)
    rest = rest[part.end() :] if part else rest
    return rest.lstrip() if closed[1] else rest


def _after(prompt: str, full: str) -> str:
    """What `full` adds to `prompt`, white space at its end aside."""
    if full.startswith(prompt):
        return full[len(prompt) :]
    core = prompt.rstrip()
    if not full.startswith(core):
        raise RecordError(_mismatch(prompt, full))
    return full[len(core) :].lstrip()


def _written(reasoning: str, answer: str, *, opened: str | None) -> str:
    """A reply with its thinking part; `opened` is the prompt's tag and what follows it."""
    lines = opened is None or opened.endswith("\n")
    thinking = f"{reasoning}\n" if reasoning and lines else reasoning
    if opened is None:
        thinking = f"\n{thinking}"
    return Reply(thinking, answer).written(opened=opened is not None)


def _mismatch(prompt: str, full: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), len(full))
    return (
        "the model's chat template writes the conversation with the reply otherwise than it asks "
        f"for the reply: {full[at : at + 30]!r} instead of {prompt[at : at + 30]!r}"
    )

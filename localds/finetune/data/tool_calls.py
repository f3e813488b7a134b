"""In which form a chat template takes tool calls; templates differ, and do not tell."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from localds.finetune.data.errors import RecordError
from localds.template import TemplateError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from localds.template import ChatTemplate

_ASKED: Final = ({"role": "user", "content": "a"},)
# Kimi's templates write the id of a call, which has the name in it.
_PROBE: Final[dict[str, Any]] = {
    "id": "functions.weather:0",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Oslo"}},
}
_SPOILED = re.compile(r'\\"|None')


@dataclass(frozen=True, slots=True)
class CallForm:
    """`as_text`: arguments are the text of an object; `null_content`: a message without text."""

    as_text: bool
    null_content: bool

    def apply(self, message: dict[str, Any], calls: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The message with its calls in this form. Raises `RecordError` for broken arguments."""
        content = message["content"] or (None if self.null_content else "")
        return {**message, "content": content, "tool_calls": [self._call(call) for call in calls]}

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        arguments = _parsed(function["arguments"])
        if self.as_text:
            given = function["arguments"]
            text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
            return {**call, "function": {**function, "arguments": text}}
        return {**call, "function": {**function, "arguments": arguments}}


def call_form(template: ChatTemplate) -> CallForm:
    """Find by trying how `template` takes calls.

    Raises `RecordError` for one that does not write them, `TemplateError` for one that fails.
    """
    failures: list[TemplateError] = []
    for form in (CallForm(text, null) for text in (True, False) for null in (True, False)):
        said = form.apply({"role": "assistant", "content": ""}, [_PROBE])
        try:
            asked = template.render(_ASKED, add_generation_prompt=False)
            text = template.render([*_ASKED, said], add_generation_prompt=False)
        except TemplateError as error:
            failures.append(error)
            continue
        written = text.removeprefix(asked)
        # A text that was made JSON again has its quotation marks escaped.
        if "weather" in written and "Oslo" in written and not _SPOILED.search(written):
            return form
    if len(failures) == 4:
        raise failures[0]
    raise RecordError("the model's chat template writes no tool calls")


def _parsed(arguments: object) -> object:
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise RecordError(f"a tool call's arguments are not JSON: {error}") from None

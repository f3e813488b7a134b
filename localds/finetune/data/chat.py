"""From a conversation to texts of which some are to be learned, through the model's own template.

At inference a model sees the encoded prompt and then what it wrote itself. So each reply is encoded
apart from what is before it, however the text would be cut as a whole.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from localds.finetune.data.errors import RecordError
from localds.finetune.data.reply import refuses_thinking, reply_in
from localds.finetune.data.tool_calls import CallForm, call_form
from localds.template import TemplateError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from localds.finetune.data.guarded import GuardedText
    from localds.finetune.data.messages import Message
    from localds.finetune.data.records import Conversation
    from localds.template import ChatTemplate

    Tools = Sequence[Mapping[str, object]] | None

TrainOn = Literal["assistant", "last", "all"]

_THINKING: Final = {"thinking": True, "enable_thinking": True}
_WORD = re.compile(r"\w+")


class Part(NamedTuple):
    """A stretch of text that is encoded by itself; `reply` says that the model begins with it."""

    text: str
    trained: bool
    reply: bool = False


class ChatWriter:
    """Writes conversations with one template, as parts; one list of them for each example."""

    def __init__(
        self,
        template: ChatTemplate,
        guarded: GuardedText,
        train_on: TrainOn,
        options: Mapping[str, Any],
    ) -> None:
        self._template, self._guarded = template, guarded
        self._train_on, self._options = train_on, dict(options)
        self._ends: dict[str, str] = {}
        self._form: CallForm | None = None

    @property
    def trains_all(self) -> bool:
        """Whether what others say counts, too."""
        return self._train_on == "all"

    def write(self, conversation: Conversation) -> list[list[Part]]:
        """The examples of a conversation.

        It is one, unless the template writes earlier turns otherwise than the model wrote them,
        as without their thinking parts: then each turn is one with its own prompt. Raises
        `RecordError` and `TemplateError`.
        """
        turns = self._turns(conversation.messages)
        if not turns and self._train_on != "all":
            raise RecordError("no message of an assistant that counts: there is nothing to learn")
        return _Writing(self, conversation, turns).examples()

    def _turns(self, messages: Sequence[Message]) -> list[int]:
        """Indices of the messages whose replies are written."""
        every = [i for i, message in enumerate(messages) if message.role == "assistant"]
        trained = [i for i in every if messages[i].trained]
        if self._train_on == "last":
            return trained[-1:]
        # Those before a trained one matter as they were written by the model.
        return every if self.trains_all else [i for i in every if trained and i <= trained[-1]]

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Tools,
        *,
        prompt: bool,
        thinking: bool = False,
    ) -> str:
        """What the template makes of messages whose special tokens are hidden."""
        options = {**_THINKING, **self._options} if thinking else self._options
        return self._template.render(messages, add_generation_prompt=prompt, tools=tools, **options)

    def shown(self, message: Message) -> dict[str, Any]:
        """A message as templates take it, special tokens hidden."""
        shown: dict[str, Any] = {"role": message.role, "content": message.content, **message.more}
        if message.reasoning:
            shown["reasoning_content"] = message.reasoning
        if message.calls:
            if self._form is None:
                self._form = call_form(self._template)
            shown = self._form.apply(shown, message.calls)
        hidden: dict[str, Any] = self._guarded.hide(shown)
        return hidden

    def hidden(self, tools: Sequence[Mapping[str, object]]) -> Tools:
        """The tools as templates take them, special tokens hidden; None for none."""
        return self._guarded.hide(list(tools)) or None

    def with_end(self, reply: str, next_role: str) -> str:
        """`reply` up to its end token; where the template writes none, with the one that is due."""
        end = self._guarded.end_of(reply)
        if end is not None:
            return reply[:end]
        if next_role not in self._ends:
            self._ends[next_role] = self._end_before(next_role)
        return reply.rstrip() + self._ends[next_role]

    def _end_before(self, role: str) -> str:
        """The token that ends a turn by beginning the next, as in GLM's format; else eos."""
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            before = self.render(talk, None, prompt=False)
            after = self.render([*talk, {"role": role, "content": "c"}], None, prompt=False)
        except TemplateError:
            return self._guarded.eos
        follows = after[len(before) :] if after.startswith(before) else ""
        return self._guarded.end_at_start(follows) or self._guarded.eos


class _Writing:
    """One conversation on its way to examples."""

    def __init__(self, writer: ChatWriter, conversation: Conversation, turns: list[int]) -> None:
        self._writer = writer
        self._messages, self._turns = conversation.messages, turns
        self._shown = [writer.shown(message) for message in conversation.messages]
        self._tools = writer.hidden(conversation.tools)
        self._examples: list[list[Part]] = []
        self._text = ""  # of the last example so far
        self._full = ""  # what the template makes of the messages so far
        self._checked = 0

    def examples(self) -> list[list[Part]]:
        """Write everything."""
        for turn in self._turns:
            self._write_turn(turn)
        if self._writer.trains_all:
            self._write_rest()
        return [parts for parts in self._examples if any(part.trained for part in parts)]

    def _write_turn(self, turn: int) -> None:
        writer, shown, tools = self._writer, self._shown, self._tools
        thought = str(shown[turn].get("reasoning_content", ""))
        prompt = writer.render(shown[:turn], tools, prompt=True)
        thinking = bool(thought) and refuses_thinking(prompt)
        if thinking:
            prompt = writer.render(shown[:turn], tools, prompt=True, thinking=True)
        full = writer.render(shown[: turn + 1], tools, prompt=False, thinking=thinking)
        self._check(prompt, turn)
        reply = reply_in(prompt, full, thought)
        self._check(reply, turn + 1)
        later = self._messages[turn + 1 :]
        reply = writer.with_end(reply, later[0].role if later else "user")
        self._add(prompt)
        self._examples[-1].append(Part(reply, self._messages[turn].trained, reply=True))
        self._text, self._full = prompt + reply, full

    def _add(self, text: str) -> None:
        """Go on with the last example until it is `text`, or begin another with that."""
        trained = self._writer.trains_all
        if self._examples and text.startswith(self._text):
            self._examples[-1].append(Part(text[len(self._text) :], trained))
        elif self._examples and text.startswith(self._full):
            # What was before counts in the example before.
            new = Part(text[len(self._full) :], trained)
            self._examples.append([Part(self._full, trained=False), new])
        else:
            self._examples.append([Part(text, trained and not self._examples)])

    def _write_rest(self) -> None:
        """What comes after the last reply."""
        after = self._turns[-1] + 1 if self._turns else 0
        if after < len(self._messages):
            text = self._writer.render(self._shown, self._tools, prompt=False)
            self._check(text, len(self._messages))
            self._add(text)

    def _check(self, text: str, end: int) -> None:
        """Raise `RecordError` where the template has left out a message without a word.

        Looks at the messages up to `end` that were not looked at before.
        """
        for message in self._shown[self._checked : end]:
            said = message["content"] or ""
            if max(_WORD.findall(said), key=len, default="") not in text:
                role = message["role"]
                raise RecordError(f"the model's chat template leaves out messages of role {role!r}")
            names = [call["function"]["name"] for call in message.get("tool_calls", ())]
            if not all(name in text for name in names):
                raise RecordError(
                    "the model's chat template leaves out what is called; Kimi's write a call's "
                    "id only, which must be like functions.NAME:0"
                )
        self._checked = end

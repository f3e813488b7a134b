"""From records to token ids, as the model is going to see them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from localds.finetune.data.chat import ChatWriter, TrainOn
from localds.finetune.data.examples import Encoded
from localds.finetune.data.guarded import GuardedText
from localds.finetune.data.records import Completion, Conversation, Record, Text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from localds.template import ChatTemplate
    from localds.tokenizer import Tokenizer

# Characters of a long text that are encoded at once, and where it may be cut: at the end of a line
# that no blank space follows, where tokens do not reach across.
_BLOCK: Final = 1 << 16
_LINE_END = re.compile(r"\n(?=\S)")


class Encoder:
    """Encodes records for one model. Not for use from several threads at once.

    `length` is the number of positions in a row of training: the longest example has one token
    more, which is only predicted. `train_on` says what counts in conversations: the turns of
    "assistant", only its "last" one, or "all" messages. `template_options` are further variables
    for the template, the same as in `Session.generate`. Raises `ValueError`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        length: int,
        train_on: TrainOn = "assistant",
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        if length < 8:
            raise ValueError(f"length is {length}; it must be at least 8")
        if train_on not in ("assistant", "last", "all"):
            raise ValueError(f"train_on is {train_on!r}; choose assistant, last or all")
        self.length = length
        self._tokenizer = tokenizer
        self._guarded = GuardedText(tokenizer)
        self._writer = ChatWriter(template, self._guarded, train_on, template_options or {})

    def encode(self, record: Record) -> list[Encoded]:
        """The examples of a record, none of them cut to `length` but the pieces of a long text.

        Raises `RecordError`, `TemplateError` and `TokenizerError`, all of them `ValueError`.
        """
        if isinstance(record, Conversation):
            return [self._guarded.encode_parts(parts) for parts in self._writer.write(record)]
        if isinstance(record, Completion):
            return [self._guarded.encode_completion(record.prompt, record.completion)]
        return list(self._pieces(record.text)) if record.cut else [self._encode_text(record)]

    def fit(self, example: Encoded) -> Encoded | None:
        """The beginning of `example` that fits; None where nothing in it would be trained."""
        if len(example) > self.length + 1:
            cut = slice(self.length + 1)
            example = Encoded(example.ids[cut], example.trained[cut])
        return example if example.trained.any() else None

    def _encode_text(self, record: Text) -> Encoded:
        return self._guarded.encode_text(record.text)

    def _pieces(self, text: str) -> Iterator[Encoded]:
        """A text in pieces of equal length but for the last, each begun as a text is."""
        blocks = _blocks(text)
        ids = list(self._tokenizer.encode(next(blocks)))
        for block in blocks:
            ids += self._guarded.continuation(block)
        ids.append(self._guarded.eos_id)
        bos = ids[:1] if self._tokenizer.add_bos else []
        body = ids[len(bos) :]
        room = self.length + 1 - len(bos)
        # Without bos a piece's first token is only seen, so it is the last one of the piece before.
        shared = 0 if bos else 1
        for start in range(0, len(body) - shared, room - shared):
            piece = np.array(bos + body[start : start + room], np.int32)
            trained = np.ones(len(piece), np.bool_)
            trained[0] = False
            yield Encoded(piece, trained)


def _blocks(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > 2 * _BLOCK:
        found = _LINE_END.search(text, start + _BLOCK)
        if found is None:
            break
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]

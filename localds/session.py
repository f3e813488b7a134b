"""A conversation with a model: prompt to tokens, tokens through the cache, text out."""

from __future__ import annotations

import time
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from localds.memory.latents import ContextError
from localds.memory.plan import DEFAULT_CHUNK
from localds.models.decoder import Interrupted
from localds.prompt import common_prefix, encode_prompt
from localds.sampling import Sampler, SamplingParams, StopMatcher
from localds.thinking import ThinkingSplitter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from threading import Event

    from numpy.typing import NDArray

    from localds.memory.kept_rows import KeptRows
    from localds.models.decoder import Decoder
    from localds.models.geometry import Geometry
    from localds.prompt import EncodedPrompt, Message
    from localds.template import ChatTemplate
    from localds.thinking import Reply
    from localds.tokenizer import TextStream, Tokenizer

DEFAULT_CONTEXT = 8192

Kind = Literal["answer", "thinking"]


def check_context(context: int | None, geometry: Geometry) -> None:
    """Raise `ContextError` for a context of more tokens than a model was made for."""
    if context is not None and context > geometry.context_length:
        raise ContextError(
            f"context of {context} tokens: the model was made for at most {geometry.context_length}"
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of the reply, as soon as it is certain. `str(piece)` is its text."""

    text: str
    kind: Kind = "answer"

    def __str__(self) -> str:
        return self.text


@dataclass(slots=True)
class Stats:
    """Figures of one `generate` call. Times in seconds.

    `finish_reason` is "stop" (the model ended, or a stop string), "length" (max_tokens),
    "context" (the context is full), "interrupted" (by `interrupt`), or "" while running.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    prefill_seconds: float = 0.0
    generated_tokens: int = 0
    decode_seconds: float = 0.0
    finish_reason: str = ""


class Session:
    """Tokens and their cache. Not for use from several threads at once."""

    def __init__(
        self,
        decoder: Decoder[Any],
        tokenizer: Tokenizer,
        template: ChatTemplate,
        context: int | None = None,
        *,
        cache_type: str = "f16",
        chunk: int = DEFAULT_CHUNK,
    ) -> None:
        check_context(context, decoder.geometry)
        if context is None:
            context = min(decoder.geometry.context_length, DEFAULT_CONTEXT)
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}; it must be at least 1")
        self._decoder = decoder
        self._tokenizer = tokenizer
        self._template = template
        self._chunk = chunk
        self._cache = decoder.new_cache(context, cache_type)
        self._tokens: list[int] = []
        self.stats = Stats()

    @property
    def context(self) -> int:
        """Tokens that fit."""
        return self._cache.capacity

    @property
    def length(self) -> int:
        """Tokens whose rows are in the cache."""
        return self._cache.length

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens whose rows are in the cache."""
        return tuple(self._tokens)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self._cache.truncate(length)
        del self._tokens[length:]

    def restore(
        self,
        prompt: str | Sequence[Message],
        kept: KeptRows,
        template_options: Mapping[str, Any] | None = None,
    ) -> int:
        """Bring the cache to what it holds and what `kept` has of `prompt`; returns tokens read.

        `generate` and `prefill` compute only the rest. Raises as encoding a prompt does in
        `generate`.
        """
        ids = self._encode(prompt, template_options).ids
        self.truncate(common_prefix(self._tokens, ids))
        try:
            return kept.restore(self._cache, ids)
        finally:
            self._tokens = ids[: self._cache.length]

    def keep(self, kept: KeptRows) -> int:
        """Write what the cache holds to `kept`; returns bytes. Raises `KeepError`, an `OSError`."""
        return kept.keep(self._cache, self._tokens)

    def prefill(
        self,
        prompt: str | Sequence[Message],
        template_options: Mapping[str, Any] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        interrupt: Event | None = None,
    ) -> None:
        """Bring the cache to `prompt`, so that `generate` can reply to what begins like it at once.

        An exception that `on_progress(done, total)` raises ends it, and so does setting
        `interrupt`; the chunks computed so far stay. Figures and errors are as in `generate`.
        """
        ids = self._encode(prompt, template_options).ids
        self.stats = Stats()
        with suppress(Interrupted):
            self._prefill(ids, on_progress, interrupt)

    def evaluate(
        self,
        ids: Sequence[int],
        *,
        all_logits: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
        interrupt: Event | None = None,
    ) -> NDArray[np.float32]:
        """Append `ids` to the cache, chunk by chunk.

        Returns the last token's logits float32 [1, n_vocab], or those of all of them with
        `all_logits`. `on_progress(done, total)` is called after each layer and chunk. Raises
        `ContextError`, before computing anything, where they do not fit, and `Interrupted` soon
        after `interrupt` was set; the chunks computed until then stay.
        """
        if not len(ids):
            raise ValueError("evaluate of no tokens: give at least one id")
        self._cache.reserve(len(ids))
        results = []
        for start in range(0, len(ids), self._chunk):
            part = ids[start : start + self._chunk]
            logits = self._decoder.forward(
                np.asarray(part, np.int32),
                self._cache,
                last_only=not all_logits,
                interrupt=interrupt,
                on_share=_part_of(on_progress, start, len(part), len(ids)),
            )
            self._tokens.extend(part)
            results.append(logits)
            if on_progress:
                on_progress(start + len(part), len(ids))
        return np.concatenate(results) if all_logits else results[-1]

    def follow(self, logits: NDArray[np.float32], count: int) -> None:
        """Append the `count` likeliest tokens after `logits` [n_vocab], whatever they mean.

        Raises `ContextError` where they do not fit.
        """
        sampler = Sampler(SamplingParams())
        with closing(self._decoder.tokens(logits, self._cache, sampler, self._tokens)) as tokens:
            for _ in range(count + 1):
                next(tokens)  # computes the row of the one before

    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        on_progress: Callable[[int, int], None] | None = None,
        template_options: Mapping[str, Any] | None = None,
        reply_so_far: Reply | None = None,
        interrupt: Event | None = None,
        **sampling: object,
    ) -> Iterator[Piece]:
        """Yield the reply to `prompt` in pieces, as they come.

        A string is continued as it stands; messages ({"role": ..., "content": ...}) go through the
        model's chat template, with `template_options` as extra variables. What the cache already
        holds of the prompt is not computed again. A reply that was cut off goes on after
        `reply_so_far`; only what is new is yielded. Setting `interrupt`, from another thread, ends
        the reply within an operation of a layer. `sampling` are the fields of `SamplingParams`.
        The figures are in `stats` afterwards. Raises `ContextError` for a prompt that does not fit,
        `TemplateError`, and `ValueError` for sampling parameters.
        """
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}; it must be at least 1")
        sampler = Sampler(SamplingParams(**sampling))  # type: ignore[arg-type]
        encoded = self._encode(prompt, template_options)
        self.stats = Stats()
        begun = reply_so_far.written(opened=encoded.opens_thinking) if reply_so_far else ""
        ids = [*encoded.ids, *self._tokenizer.encode(begun, special=True, bos=False)]
        # A reply to messages begins a text of its own, the continuation of a text does not.
        stream = self._tokenizer.stream(start=not isinstance(prompt, str) and not begun)
        try:
            logits = self._prefill(ids, on_progress, interrupt)
        except Interrupted:
            self.stats.finish_reason = "interrupted"
            return
        text = self._decode(logits, sampler, stream, StopMatcher(stop), max_tokens, interrupt)
        if isinstance(prompt, str):
            yield from (Piece(part) for part in text if part)
        else:
            splitter = ThinkingSplitter(starts_inside=encoded.opens_thinking)
            yield from _pieces(text, splitter, begun)

    def _encode(
        self, prompt: str | Sequence[Message], template_options: Mapping[str, Any] | None
    ) -> EncodedPrompt:
        return encode_prompt(self._tokenizer, self._template, prompt, template_options or {})

    def _prefill(
        self,
        ids: Sequence[int],
        on_progress: Callable[[int, int], None] | None,
        interrupt: Event | None,
    ) -> NDArray[np.float32]:
        """Bring the cache to `ids`, keeping what is common; returns the last logits [n_vocab]."""
        if not len(ids):
            raise ValueError("the prompt is empty: give at least one token")
        if len(ids) > self.context:
            raise ContextError(
                f"the prompt has {len(ids)} tokens, but the context holds {self.context}; "
                "choose a larger context or shorten the prompt"
            )
        # The last token is always computed: its logits are not in the cache.
        reused = min(common_prefix(self._tokens, ids), len(ids) - 1)
        self.truncate(reused)
        started = time.perf_counter()
        self.stats.prompt_tokens = len(ids)
        self.stats.reused_tokens = reused
        logits = self.evaluate(ids[reused:], on_progress=on_progress, interrupt=interrupt)
        self.stats.prefill_seconds = time.perf_counter() - started
        last: NDArray[np.float32] = logits[0]
        return last

    def _decode(
        self,
        logits: NDArray[np.float32],
        sampler: Sampler,
        stream: TextStream,
        stops: StopMatcher,
        max_tokens: int | None,
        interrupt: Event | None,
    ) -> Iterator[str]:
        """Yield text until the model ends, a stop string comes, or there is no more room."""
        stats = self.stats
        tokens = self._decoder.tokens(logits, self._cache, sampler, self._tokens, interrupt)
        with closing(tokens):
            while not stats.finish_reason:
                started = time.perf_counter()
                try:
                    token = next(tokens)
                except Interrupted:
                    stats.finish_reason = "interrupted"
                    break
                ended = token in self._tokenizer.eos_ids
                text = "" if ended else stops.push(stream.push(token))
                stats.decode_seconds += time.perf_counter() - started
                if ended:
                    stats.finish_reason = "stop"
                    break
                stats.generated_tokens += 1
                if text:
                    yield text
                if stops.stopped:
                    stats.finish_reason = "stop"
                elif stats.generated_tokens == max_tokens:
                    stats.finish_reason = "length"
                elif self._cache.length == self.context:
                    stats.finish_reason = "context"
        yield stops.push(stream.flush()) + stops.flush()


def _part_of(
    on_progress: Callable[[int, int], None] | None, start: int, part: int, total: int
) -> Callable[[float], None] | None:
    """Progress within a chunk of several tokens, as if its tokens came one after the other."""
    if on_progress is None or part == 1:
        return None
    # A chunk is done only when its tokens count as read.
    return lambda share: on_progress(start + min(int(share * part), part - 1), total)


def _pieces(text: Iterator[str], splitter: ThinkingSplitter, begun: str = "") -> Iterator[Piece]:
    """Tell thinking from answer; the blank lines between the two belong to neither.

    `begun` is what the reply begins with, without it being told again.
    """
    before = splitter.push(begun)
    thought = bool(before) and before[-1][0] == "thinking"
    for part in chain(text, [None]):
        for kind, words in splitter.flush() if part is None else splitter.push(part):
            if kind == "thinking":
                thought = True
            elif thought:
                words = words.lstrip()
                thought = not words
            if words:
                yield Piece(words, kind)

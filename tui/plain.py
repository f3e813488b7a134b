"""The plain line interface: questions at a prompt, answers streamed below."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from localds.model import Model
    from localds.session import Piece, Session, Stats

DIM, RESET = "\x1b[2m", "\x1b[0m"
HELP = """\
/system TEXT   set the system prompt and begin anew
/clear         begin anew
/stats         figures of the last reply
/help          this list
/bye           leave (also Ctrl-D)
Ctrl-C stops a reply; its beginning is kept. End a line with \\ to go on in the next."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What was printed: the answer without its thinking part."""

    answer: str
    interrupted: bool


def print_reply(pieces: Iterable[Piece]) -> Reply:
    """Print the answer to stdout and the thinking part, dimmed, to stderr, as they come.

    Ctrl-C ends the reply and is reported, not raised.
    """
    dim, reset = (DIM, RESET) if sys.stderr.isatty() else ("", "")
    answer: list[str] = []
    thinking = False
    interrupted = False
    try:
        for piece in pieces:
            if piece.kind == "thinking":
                print(f"{dim}{piece.text}{reset}", end="", flush=True, file=sys.stderr)
                thinking = True
                continue
            if thinking:
                print(file=sys.stderr, flush=True)
                thinking = False
            answer.append(piece.text)
            print(piece.text, end="", flush=True)
    except KeyboardInterrupt:
        interrupted = True
    print(flush=True)
    return Reply("".join(answer), interrupted)


def print_stats(stats: Stats) -> None:
    """Print the figures of a reply to stderr."""
    print(stats_line(stats), file=sys.stderr, flush=True)


def stats_line(stats: Stats) -> str:
    """The figures of a reply in one line."""
    computed = stats.prompt_tokens - stats.reused_tokens
    reused = f" ({stats.reused_tokens} reused)" if stats.reused_tokens else ""
    ends = {"stop": "", "length": ", cut at the token limit", "context": ", the context is full"}
    why = ends.get(stats.finish_reason, ", interrupted")
    return (
        f"[prompt {stats.prompt_tokens} tokens{reused}, {_rate(computed, stats.prefill_seconds)}; "
        f"reply {stats.generated_tokens} tokens, "
        f"{_rate(stats.generated_tokens, stats.decode_seconds)}{why}]"
    )


def converse(
    model: Model,
    session: Session,
    system: Sequence[dict[str, str]],
    options: dict[str, Any],
) -> None:
    """Read questions and answer them until /bye or the end of input."""
    with suppress(ImportError):
        import readline  # noqa: F401  line editing and history, where the platform has it
    name = model.gguf.text("general.name", "") or model.gguf.path.name
    print(f"{name}, context of {session.context} tokens. /help lists the commands.")
    messages = list(system)
    while (line := _read_line()) is not None:
        if not line.strip():
            continue
        if line.startswith("/"):
            if _command(line, messages, session):
                return
            continue
        _exchange(session, messages, line, options)


def _exchange(
    session: Session, messages: list[dict[str, str]], line: str, options: dict[str, Any]
) -> None:
    messages.append({"role": "user", "content": line})
    try:
        reply = print_reply(session.generate(messages, on_progress=_show_progress, **options))
    except ValueError as error:
        # A question that cannot be answered leaves the conversation as it was.
        messages.pop()
        print(f"error: {error}", file=sys.stderr)
        return
    messages.append({"role": "assistant", "content": reply.answer})


def _read_line() -> str | None:
    """One question, lines joined over a trailing backslash; None at the end of input."""
    lines: list[str] = []
    while True:
        try:
            line = input("... " if lines else ">>> ")
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print("\n(/bye or Ctrl-D leaves)")
            lines = []
            continue
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])


def _command(line: str, messages: list[dict[str, str]], session: Session) -> bool:
    """Carry out a slash command; True to leave."""
    word, _, rest = line.partition(" ")
    match word:
        case "/bye" | "/exit" | "/quit":
            return True
        case "/clear":
            messages[:] = [m for m in messages if m["role"] == "system"]
        case "/system":
            messages[:] = [{"role": "system", "content": rest}] if rest.strip() else []
        case "/stats":
            print(stats_line(session.stats))
        case "/help":
            print(HELP)
        case _:
            print(f"unknown command {word}; /help lists them", file=sys.stderr)
    return False


def _show_progress(done: int, total: int) -> None:
    """Prefill progress on one line of the terminal, wiped when it is done."""
    if not sys.stderr.isatty() or total <= 512:
        return
    text = "" if done == total else f"reading the prompt: {done} of {total} tokens"
    print(f"\r\x1b[K{text}", end="", flush=True, file=sys.stderr)


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:.1f} tokens/s" if seconds > 0 else "0 tokens/s"

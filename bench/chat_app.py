"""What the chat app costs, and how fast it answers to keys.

    python bench/chat_app.py stream                     # 200 tokens/s into 100k tokens of chat
    python bench/chat_app.py panel MODEL [--rounds 5]   # decode speed, panel shown and hidden
    python bench/chat_app.py stop MODEL                 # from Esc to the end of the reply
    python bench/chat_app.py reopen MODEL [--tokens N]  # a long chat, from the choice to ready

The app runs as in a terminal of 160 x 50, without one.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import threading
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localds.session import Piece
from tui.app import ChatApp
from tui.launch import Launch
from tui.replying import Replying
from tui.run import Request, Run
from tui.store.conversations import ConversationStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from textual.pilot import Pilot

REPLY = """## Mixture of experts

A router picks **8 of 256** experts for each token, so that only a part of the weights is read.

1. scores: `sigmoid(x @ w)`
2. the best groups, then the best experts

```python
def route(x, weight, top_k):
    scores = sigmoid(x @ weight)
    return scores.topk(top_k)
```

"""
SIZE = (160, 50)
TOKEN = 4  # characters


@asynccontextmanager
async def running(folder: Path, model: str | None) -> AsyncIterator[tuple[ChatApp, Pilot[None]]]:
    with ConversationStore(folder / "chats.db") as store:
        app = ChatApp(Launch(model=model, given={"temperature": 0.0}), store)
        async with app.run_test(size=SIZE) as pilot:
            while app.loaded is None:
                await pilot.pause(0.05)
            yield app, pilot


async def answered(app: ChatApp) -> None:
    while app.chat_screen.chat.replying is not None:
        await asyncio.sleep(0.2)  # the pilot's own pause would cost more than the app


def milliseconds(values: list[float]) -> str:
    ordered = sorted(values)
    at = [ordered[min(int(len(ordered) * q), len(ordered) - 1)] * 1000 for q in (0.5, 0.99, 1)]
    return f"median {at[0]:.1f} ms, 99% {at[1]:.1f} ms, worst {at[2]:.1f} ms"


async def stream(folder: Path, tokens: int, speed: int, seconds: float) -> None:
    """A reply at `speed` tokens a second below a conversation of `tokens` tokens."""
    with ConversationStore(folder / "chats.db") as store:
        chat = store.create("long")
        parent = None
        reply = REPLY * 4
        for _ in range(tokens * TOKEN // len(reply)):
            parent = store.add(chat.id, parent, "user", "Explain again, please.").id
            parent = store.add(chat.id, parent, "assistant", reply).id
            store.update(parent, finish="stop")
    async with running(folder, None) as (app, pilot):
        screen = app.chat_screen
        started = time.perf_counter()
        screen.open_chat(chat.id)
        await pilot.pause()
        opened = time.perf_counter() - started
        print(f"{len(screen.transcript.entries)} messages shown after {opened:.2f} s")
        app.engine.stop()
        message = screen.conversation.begin_reply("model")
        entry = screen.chat._entry(message)
        screen.transcript.add(entry)
        run = Run(Request([]))
        screen.chat.replying = Replying(run, message, entry, screen.transcript, screen.writer)
        screen.chat.last_run = run
        feeder = threading.Thread(target=feed, args=(run, speed, seconds))
        late: list[float] = []
        cpu, drawn = time.process_time(), screen.transcript.painter.drawn
        feeder.start()
        began = time.perf_counter()
        while feeder.is_alive():
            asked = time.perf_counter()
            await asyncio.sleep(0.005)
            late.append(time.perf_counter() - asked - 0.005)
        took = time.perf_counter() - began
        share = (time.process_time() - cpu) / took
        blocks = screen.transcript.painter.drawn - drawn
        print(f"a key waits: {milliseconds(late)}")
        print(f"one core {100 * share:.0f}% busy, {blocks / took:.0f} blocks drawn a second")
        print(f"shown {len(entry.content)} of {int(speed * seconds * TOKEN)} characters")
        screen.chat.stop()


def feed(run: Run, speed: int, seconds: float) -> None:
    began = time.perf_counter()
    text = REPLY * (int(speed * seconds * TOKEN) // len(REPLY) + 1)
    for token in range(int(speed * seconds)):
        time.sleep(max(began + token / speed - time.perf_counter(), 0))
        run.stats.generated_tokens += 1
        run.put(Piece(text[token * TOKEN : (token + 1) * TOKEN]))


async def panel(folder: Path, model: str, rounds: int, tokens: int) -> None:
    """Decode speed with the panel shown, hidden, and with nothing drawn at all, in turns."""
    speeds: dict[str, list[float]] = {"nothing": [], "hidden": [], "shown": []}
    async with running(folder, model) as (app, _):
        for _ in range(rounds):
            for kind, found in speeds.items():
                run = await reply(app, kind, tokens)
                found.append(run.stats.generated_tokens / run.stats.decode_seconds)
    for kind, found in speeds.items():
        print(f"{kind}: {statistics.median(found):.2f} tokens/s {[f'{s:.1f}' for s in found]}")
    for a, b in (("shown", "hidden"), ("hidden", "nothing"), ("shown", "nothing")):
        ratios = [x / y for x, y in zip(speeds[a], speeds[b], strict=True)]
        print(f"{a} / {b}: median {statistics.median(ratios):.3f}")


async def reply(app: ChatApp, kind: str, tokens: int) -> Run:
    """One reply of so many tokens, in the app or only in its engine."""
    screen = app.chat_screen
    screen._panel_shown = kind == "shown"
    screen.show_parts()
    screen.open_chat(None)
    screen.change_setting("max_tokens", tokens)
    if kind == "nothing":
        question = [{"role": "user", "content": "Tell me about experts."}]
        run = app.engine.answer(Request(question, {"temperature": 0.0, "max_tokens": tokens}))
        while run.finish is None:
            await asyncio.sleep(0.2)
        return run
    screen.chat.ask("Tell me about experts.")
    screen._changed()
    await answered(app)
    return screen.chat.last_run


async def stop(folder: Path, model: str) -> None:
    """From Esc until the reply is marked as stopped, and until the engine is free again."""
    async with running(folder, model) as (app, pilot):
        screen = app.chat_screen
        for what, text in (("answering", "Tell me all."), ("reading", "word " * 5000)):
            screen.open_chat(None)
            screen.chat.ask(text)
            screen._changed()
            run: Any = screen.chat.last_run
            while what == "answering" and run.stats.generated_tokens < 5:
                await pilot.pause(0.01)
            await pilot.pause(0.5)
            started = time.perf_counter()
            await pilot.press("escape")
            shown = time.perf_counter() - started
            while run.finish is None:
                await asyncio.sleep(0.002)
            free = time.perf_counter() - started
            print(f"Esc while {what}: shown after {shown:.3f} s, free after {free:.3f} s")


async def reopen(folder: Path, model: str, tokens: int) -> None:
    """A chat of about `tokens` tokens, opened again by a new app."""
    async with running(folder, model) as (app, pilot):
        screen = app.chat_screen
        screen.change_setting("context", tokens + 2048)
        screen.change_setting("max_tokens", 16)
        while app.loaded is None:
            await pilot.pause(0.05)
        per_word = app.engine.count_tokens("some words " * 500) / 1000
        screen.chat.ask("some words " * int(tokens / per_word / 2))
        await answered(app)
        stats = screen.chat.last_run.stats
        chat = screen.conversation.id
        print(f"read {stats.prompt_tokens} tokens in {stats.prefill_seconds:.1f} s")
    async with running(folder, model) as (app, pilot):
        screen = app.chat_screen
        app._options = app._options.__class__(context=tokens + 2048)
        app.load_model(model)
        while app.loaded is None:
            await pilot.pause(0.05)
        started = time.perf_counter()
        screen.open_chat(chat)
        while app.engine.context_used < stats.prompt_tokens - 32:
            await asyncio.sleep(0.002)
        print(f"restored {app.engine.context_used} after {time.perf_counter() - started:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["stream", "panel", "stop", "reopen"])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        match options.what:
            case "stream":
                work = stream(folder, options.tokens or 100_000, 200, 20.0)
            case "panel":
                work = panel(folder, options.model, options.rounds, options.tokens or 128)
            case "stop":
                work = stop(folder, options.model)
            case _:
                work = reopen(folder, options.model, options.tokens or 10_000)
        asyncio.run(work)


if __name__ == "__main__":
    main()

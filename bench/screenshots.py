"""The pictures of the README, made by the chat app itself: SVG files in docs/screenshots.

usage: screenshots.py [--out FOLDER]

The app runs on the built-in model in empty folders of its own. What it shows is made up: the
conversation is written below, and the figures are those of a model of V2 Lite's shape on a machine
of 16 GiB, its experts used as unevenly as a few hot ones and many cold ones are.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import tempfile
import time
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
from huggingface_hub import constants

from localds import monitor
from localds.monitor import ExpertActivity, Figures, Reading, Tier
from tui import model_fit, models_on_offer
from tui.app import ChatApp
from tui.engine import Engine
from tui.launch import Launch
from tui.screens import chat as chat_screen
from tui.store.conversations import ConversationStore
from tui.store.records import Attachment, Conversation, Message
from tui.widgets import status
from tui.widgets.machine import MachinePanel, Progress
from tui.widgets.offer_table import OfferTable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from textual.pilot import Pilot

FOLDER = Path(__file__).parent.parent / "docs" / "screenshots"
GIB = 1024**3
MODEL = "DeepSeek V2 Lite Chat (Q4_K_M)"
LAYERS, EXPERTS, ACTIVE = 26, 64, 6
EXPERT_BYTES = 5_600_000
IN_MEMORY = 0.45
SPEED = 11.4  # tokens a second
FIRST, PAUSE, NOW = 20, 24, 4  # seconds of the first reply, of reading it, of the second so far
EARLIER = 1200  # tokens before this chat

QUESTION = "How does a mixture-of-experts layer choose its experts? Show me the routing in code."
ANSWER = """\
A small **router** scores all experts for each token. Only the best few are computed; \
the *shared* experts always are.

```python
def moe(x, router, experts, shared, k=6):
    scores = softmax(router @ x)        # one score per expert
    chosen = scores.argsort()[-k:]      # the k best ones
    y = sum(scores[i] * experts[i](x) for i in chosen)
    return y + shared(x)
```

So each token reads a fraction of the weights:

| Model   | Experts | Chosen | Parameters | Active |
|---------|--------:|-------:|-----------:|-------:|
| V2 Lite |      64 |      6 |       16 B |  2.4 B |
| V3      |     256 |      8 |      671 B |   37 B |

What was not chosen may stay on disk until a token wants it."""
FOLLOW_UP = "Which experts are worth keeping in memory?"
SECOND = """\
Those that were chosen often of late. Use is uneven: in most layers a quarter of the experts \
does most of the work, so a memory that holds"""


# What the machine is said to do


class Usage:
    """Routed experts at work: which are used how often, which lie in memory, what was read."""

    def __init__(self) -> None:
        random = np.random.default_rng(7)
        ranks = random.permuted(np.tile(np.arange(EXPERTS), (LAYERS, 1)), axis=1)
        weights = 1 / (ranks + 1.5) ** 0.85
        self._shares = weights / weights.sum(axis=1, keepdims=True)
        worth = (weights * random.uniform(0.5, 1.6, weights.shape)).ravel()
        resident = np.zeros(LAYERS * EXPERTS, bool)
        resident[np.argsort(-worth)[: int(IN_MEMORY * worth.size)]] = True
        self._resident = resident.reshape(LAYERS, EXPERTS)
        self._uses = np.zeros((LAYERS, EXPERTS), np.uint64)
        self._figures = Figures()
        self._random = random

    def run(self, tokens: int) -> None:
        """Send tokens through all layers."""
        for layer in range(LAYERS):
            counts = self._random.multinomial(tokens * ACTIVE, self._shares[layer])
            self._uses[layer] += counts.astype(np.uint64)
            hits = int(counts[self._resident[layer]].sum())
            misses = int(counts.sum()) - hits
            done = self._figures
            self._figures = Figures(
                done.hits + hits,
                done.misses + misses,
                done.read_bytes + misses * EXPERT_BYTES,
                done.stall_seconds + misses * 3e-4,
            )

    def reading(self) -> Reading:
        """What `localds.monitor.read` would tell."""
        experts = ExpertActivity(tuple(range(1, LAYERS + 1)), self._uses.copy(), self._resident)
        pool = int(IN_MEMORY * LAYERS * EXPERTS) * EXPERT_BYTES
        all_experts = LAYERS * EXPERTS * EXPERT_BYTES
        tiers = (
            Tier("RAM: weights", round(0.98 * GIB), round(0.98 * GIB)),
            Tier("RAM: experts", pool, pool),
            Tier("RAM: latent cache", round(0.037 * GIB), round(0.247 * GIB)),
            Tier("disk", all_experts - pool, all_experts),
            Tier("process", round(1.31 * GIB) + pool, round(6.5 * GIB)),
        )
        return Reading(experts, tiers, self._figures)


def progress(second: int) -> Progress | None:
    """The reply so many seconds after the first began; None while there is none."""
    begun = 0 if second < FIRST else FIRST + PAUSE
    if FIRST <= second < begun:
        return None
    speed = SPEED + 2.2 * np.sin(second / 3) + np.sin(second * 1.7)
    tokens = round(SPEED * (second - begun))
    return Progress(
        state="answering",
        prompt_done=402,
        prompt_total=402,
        reused=361,
        first_token_seconds=0.62,
        generated=tokens,
        tokens_per_second=float(speed),
        prefill_per_second=66.1,
        context_used=402 + tokens,
        context_size=8192,
    )


# What was said


def write_chats(store: ConversationStore) -> int:
    """The conversation, and others for the list; returns its id."""
    now = time.time()
    for title, days in [("Rename files by their date", 3), ("What is a GGUF file?", 1)]:
        moment = now - days * 86400
        store.insert(Conversation(1, title, MODEL, {}, None, moment, moment), ())
    stats = {"generated_tokens": 231, "decode_seconds": 19.6}
    messages = [
        _message(1, None, "user", QUESTION),
        _message(2, 1, "assistant", ANSWER, stats=stats),
        _message(3, 2, "user", FOLLOW_UP, attachments=(Attachment("usage.csv", "", 118),)),
        _message(4, 3, "assistant", SECOND),
    ]
    chat = Conversation(1, "How does a mixture-of-experts", MODEL, {}, 4, now, now)
    return store.insert(chat, messages).id


def _message(number: int, parent: int | None, role: Any, content: str, **changes: Any) -> Message:
    model = MODEL if role == "assistant" else ""
    plain = Message(number, 0, parent, role, content, "", 0.0, (), "stop", model, {}, time.time())
    return replace(plain, **changes)


# The app


@asynccontextmanager
async def app_of(size: tuple[int, int], theme: str) -> AsyncIterator[tuple[ChatApp, Pilot[None]]]:
    """The app with the conversation open, while the model answers the second question."""
    usage = Usage()
    usage.run(EARLIER)
    machine = Machine(1000, usage.reading(), Progress(context_size=8192))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for change in (*_own_folders(Path(folder)), *machine.patches()):
            stack.enter_context(change)
        store = stack.enter_context(ConversationStore(Path(folder) / "chats.db"))
        number = write_chats(store)
        app = ChatApp(Launch(given={"theme": theme}), store)
        async with app.run_test(size=size) as pilot:
            await _until(pilot, lambda: app.loaded is not None)
            app.loaded = replace(app.loaded, title=MODEL)  # type: ignore[type-var]
            app.chat_screen.open_chat(number)
            entries = app.chat_screen.transcript.entries
            await _until(pilot, lambda: all(entry.is_measured() for entry in entries))
            for second in range(FIRST + PAUSE + NOW):
                machine.tick(usage, progress(second), app.chat_screen.query_one(MachinePanel))
            app.chat_screen.show_status()
            await pilot.pause(0.3)
            yield app, pilot


@dataclass
class Machine:
    """What the app is told about the machine. `clock` is in seconds."""

    clock: int
    reading: Reading
    progress: Progress

    def tick(self, usage: Usage, progress: Progress | None, panel: MachinePanel) -> None:
        """Let a second go by."""
        self.clock += 1
        if progress is not None:
            usage.run(round(SPEED))
            self.reading, self.progress = usage.reading(), progress
            panel.show(self.progress, self.reading)

    def patches(self) -> Iterator[Any]:
        """Put this in the place of the real machine."""
        yield patch.object(monitor, "read", lambda *_: self.reading)
        yield patch.object(chat_screen, "progress_of", lambda *_: self.progress)
        yield patch.object(status, "progress_of", lambda *_: self.progress)
        yield patch.object(Engine, "open", lambda *_: None)
        used = property(lambda _: self.progress.context_used)
        size = property(lambda _: self.progress.context_size)
        yield patch.object(Engine, "context_used", used)
        yield patch.object(Engine, "context_size", size)
        yield patch.dict(MachinePanel.__init__.__kwdefaults__, {"clock": lambda: self.clock})
        yield patch.object(model_fit, "budget_for", lambda _: 13 * GIB)
        yield patch.object(model_fit, "total_memory", lambda: 16 * GIB)
        yield patch.object(models_on_offer, "shortage", lambda _: None)


def _own_folders(folder: Path) -> Iterator[Any]:
    variables = {f"XDG_{name}_HOME": str(folder) for name in ("CONFIG", "STATE", "CACHE")}
    yield patch.dict(os.environ, variables | {"COLORTERM": "truecolor", "TERM": "xterm-256color"})
    yield patch.object(constants, "HF_HUB_CACHE", str(folder / "hub"))


async def _until(pilot: Pilot[None], condition: Any) -> None:
    end = time.monotonic() + 30
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("the app does not come to what is to be drawn")
        await pilot.pause(0.05)


def _save(app: ChatApp, path: Path) -> None:
    svg = app.export_screenshot(title="localds", simplify=True)
    # Long names, with a number that is another one each time, in thousands of places.
    path.write_text(re.sub(r"terminal-\d+", "t", svg), encoding="utf-8")
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


async def draw(folder: Path) -> None:
    """Draw all pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    async with app_of((120, 36), "localds-dark") as (app, pilot):
        _save(app, folder / "chat.svg")
        await pilot.press("ctrl+o")
        await _until(pilot, lambda: app.screen.query_one(OfferTable).row_count)
        await pilot.press(*["down"] * 4)
        await pilot.pause(0.3)
        _save(app, folder / "models.svg")
    async with app_of((80, 24), "localds-light") as (app, _):
        _save(app, folder / "chat-light-80x24.svg")


def main() -> None:
    """Draw the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=FOLDER)
    asyncio.run(draw(parser.parse_args().out))


if __name__ == "__main__":
    main()

"""Every screen of the chat app, narrow and wide, as it was when somebody last looked at it.

The screens lie in tests/golden/screens as text, see screens.py. Where one was changed on purpose,

    LOCALDS_UPDATE_SCREENS=1 pytest tests/test_snapshots.py

draws all of them anew, and `git diff tests/golden/screens` shows what has become of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from chat_app import GREEDY, Driver, in_loop, running
from hub_home import REPOSITORY, SMALL, install
from screens import FOLDER, check_screen

from localds import monitor
from localds.catalog import known
from localds.catalog.resolve import DEMO
from localds.monitor import ExpertActivity, Figures, Reading, Tier
from tui import model_fit, models_on_offer
from tui.engine import Engine, LoadFailed
from tui.screens import chat as chat_screen
from tui.store.conversations import ConversationStore
from tui.store.records import Attachment, Conversation, Message
from tui.widgets import sidebar, status
from tui.widgets.machine import MachinePanel, Progress
from tui.widgets.offer_table import OfferTable

if TYPE_CHECKING:
    from pathlib import Path

GIB = 1024**3
NOW = 1_781_100_000.0  # Wednesday, 10 June 2026, 14:00 UTC
DAY = 86400
MODEL = "DeepSeek V2 Lite Chat (Q4_K_M)"

ANSWER = """\
# Mixture of experts

A layer holds many **small** feed-forward networks, the *experts*. A router \
sends each token to a few of them, so that most weights rest.

1. The router scores every expert.
2. The best `k` are taken:
   - their outputs are weighted,
   - and added to those of the shared experts.

| Model   | Experts | Active |
|---------|--------:|-------:|
| V2 Lite |      64 |      6 |
| V3      |     256 |      8 |

```python
def route(hidden, router, k=6):
    scores = softmax(hidden @ router.T)
    return scores.topk(k)  # weights, ids
```

> Nothing is computed for experts that were not chosen.

See [the paper](https://arxiv.org/abs/2405.04434), or read on.

---
"""
THOUGHT = """\
The user wants to know how a layer with experts works. The two files show a router and its \
configuration, so an example in Python fits.

I should mention the shared experts, too."""

MODELS = """
["v2-lite-chat"]
title = "DeepSeek V2 Lite Chat"
repository = "example/DeepSeek-V2-Lite-Chat-GGUF"
parameters = "16B, 2.4B active"
context = 163840
license = "deepseek"
default = "Q4_K_M"
notes = "Small general chat model that answers without thinking."
["v2-lite-chat".quants]
Q4_K_M = { files = "chat.Q4_K_M.gguf", size = "10.36 GB" }
Q8_0 = { files = "chat.Q8_0.gguf", size = "16.70 GB" }
["r1"]
title = "DeepSeek R1"
repository = "example/DeepSeek-R1-GGUF"
parameters = "671B, 37B active"
context = 163840
license = "mit"
default = "Q4_K_M"
notes = "Large model that thinks before it answers."
["r1".quants]
Q4_K_M = { files = "R1-Q4_K_M/*.gguf", size = "404 GB" }
"""


# What differs from machine to machine, made the same


@dataclass
class Machine:
    """What the app believes about the machine: the time in seconds, and what the model does."""

    now: float
    reading: Reading
    progress: Progress


@pytest.fixture(autouse=True)
def machine(home: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A terminal of true colours, a machine of 24 GiB, 10 June 2026, four known models."""
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    calendar = SimpleNamespace(
        time=lambda: NOW,
        localtime=lambda moment=NOW: time.gmtime(moment),
        strftime=time.strftime,
    )
    monkeypatch.setattr(sidebar, "time", calendar)
    (home / "shipped.toml").write_text(MODELS)
    monkeypatch.setattr(known, "shipped_file", lambda: home / "shipped.toml")
    monkeypatch.setattr(model_fit, "budget_for", lambda _: 18 * GIB)
    monkeypatch.setattr(model_fit, "total_memory", lambda: 24 * GIB)
    monkeypatch.setattr(models_on_offer, "shortage", lambda _: None)
    # The cache is left empty, or it would show how far it is.
    monkeypatch.setattr(Engine, "open", lambda *_: None)
    machine = Machine(1000.0, guide_reading(), Progress(context_used=612, context_size=2048))
    monkeypatch.setattr(monitor, "read", lambda *_: machine.reading)
    monkeypatch.setattr(chat_screen, "progress_of", lambda *_: machine.progress)
    monkeypatch.setattr(status, "progress_of", lambda *_: machine.progress)
    monkeypatch.setattr(Engine, "context_used", property(lambda _: machine.progress.context_used))
    monkeypatch.setattr(Engine, "context_size", property(lambda _: machine.progress.context_size))
    monkeypatch.setitem(MachinePanel.__init__.__kwdefaults__, "clock", lambda: machine.now)
    return machine


def guide_reading() -> Reading:
    """A small model, all of it in memory."""
    uses = np.outer(np.arange(3, 0, -1), 840 // np.arange(1, 9)).astype(np.uint64)
    tiers = (
        Tier("RAM: weights", 9 * 1024**2, 9 * 1024**2),
        Tier("RAM: latent cache", 2 * 1024**2, 6 * 1024**2),
        Tier("process", 180 * 1024**2, 4 * GIB),
    )
    return Reading(ExpertActivity((1, 2, 3), uses, np.ones((3, 8), bool)), tiers, Figures())


def large_reading(figures: Figures) -> Reading:
    """A model of V2 Lite's shape, 45% of whose experts are in memory: mostly the busy ones."""
    layers, experts = np.mgrid[0:26, 0:64]
    rank = (experts * 37 + layers * 11) % 64  # each layer has another order of experts
    uses = (24_000 / (1 + rank) ** 0.9).astype(np.uint64)
    resident = (rank < 26) | ((rank * 7 + layers) % 13 == 0)
    tiers = (
        Tier("RAM: weights", round(1.42 * GIB), round(1.42 * GIB)),
        Tier("RAM: experts", round(4.1 * GIB), round(4.25 * GIB)),
        Tier("RAM: latent cache", round(0.094 * GIB), round(0.244 * GIB)),
        Tier("disk", round(5.1 * GIB), round(9.3 * GIB)),
        Tier("process", round(6.2 * GIB), 8 * GIB),
    )
    return Reading(ExpertActivity(tuple(range(1, 27)), uses, resident), tiers, figures)


# Stored chats


def write_chats(folder: Path) -> None:
    """Some chats of different days, that of `conversation` the newest."""
    titles = [
        ("Grüße und 日本語 in one title that is longer than the list is wide", 0.1),
        ("What is a GGUF file?", 2),
        ("", 4),
        ("[bold]not markup[/]", 40),
        ("Last year's question", 400),
    ]
    with ConversationStore(folder / "chats.db") as store:
        for title, days in titles:
            moment = NOW - days * DAY
            chat = Conversation(1, title, MODEL, {}, None, moment, moment)
            store.insert(chat, [message(1, None, "user", title, created=moment)])
        chat = Conversation(1, "How do experts work?", MODEL, {}, 6, NOW - 600, NOW - 600)
        store.insert(chat, conversation())


def conversation() -> list[Message]:
    """A question with files, its answer; then a question asked twice, its second answer stopped."""
    files = (Attachment("router.py", "k = 6", 310), Attachment("config.json", "{}", 42))
    stats = {"generated_tokens": 231, "decode_seconds": 16.2}
    return [
        message(1, None, "user", "How do experts work? See @router.py", attachments=files),
        message(2, 1, "assistant", ANSWER, thinking=THOUGHT, thinking_seconds=12.4, stats=stats),
        message(3, 2, "user", "And in one sentence?"),
        message(4, 3, "assistant", "A router picks a few networks for each token."),
        message(5, 2, "user", "And in one sentence, please?"),
        message(
            6,
            5,
            "assistant",
            "A router picks, for each token, a few of many",
            thinking="One sentence only.",
            finish="stopped",
        ),
    ]


def message(number: int, parent: int | None, role: Any, content: str, **changes: Any) -> Message:
    """A message of a reply that ended well."""
    model = MODEL if role == "assistant" else ""
    plain = Message(number, 0, parent, role, content, "", 0.0, (), "stop", model, {}, NOW)
    return replace(plain, **changes)


# The screens


async def open_newest(driver: Driver) -> None:
    """Show the chat of `conversation`."""
    await driver.until(lambda: driver.app.chat_screen.sidebar.found)
    driver.app.chat_screen.open_chat(driver.app.chat_screen.sidebar.found[0].id)
    await driver.until(lambda: len(driver.entries) == 4)
    await driver.until(lambda: all(entry.is_measured() for entry in driver.entries))


async def chat_top(driver: Driver) -> None:
    await open_newest(driver)
    await driver.press("ctrl+up", "home")


async def chat_code(driver: Driver) -> None:
    await chat_top(driver)
    await driver.press("pagedown")


async def chat_folded(driver: Driver) -> None:
    """What the last reply thought is folded; it is selected."""
    await open_newest(driver)
    await driver.press("ctrl+up", "t")


async def empty(driver: Driver) -> None:
    """Nothing was asked yet."""


async def chats(driver: Driver) -> None:
    """The list of chats has the focus, and the second of them the cursor."""
    await open_newest(driver)
    await driver.press("ctrl+b", "down")


async def machine_panel(driver: Driver, machine: Machine) -> None:
    """A large model answers, with experts on disk."""
    panel = driver.app.chat_screen.query_one(MachinePanel)
    if not panel.has_class("shown"):
        await driver.press("ctrl+g")
    await driver.until(lambda: panel.is_on_screen)
    for second in range(45):
        speed = 12 + 3 * np.sin(second / 6)
        machine.now += 1
        machine.progress = Progress(
            "answering", 2048, 2048, 128, 1.84, 13 * second, speed, 311.6, 3021, 8192
        )
        panel.show(machine.progress, machine.reading)
    machine.now += 1
    machine.reading = large_reading(Figures(52_400, 4_700, 31 * GIB, 3.2))
    panel.show(machine.progress, machine.reading)
    driver.app.chat_screen.show_status()


async def models(driver: Driver, home: Path) -> None:
    """One model is installed, the cursor is on another."""
    install(home, REPOSITORY, {SMALL: DEMO.read_bytes()})
    await driver.press("ctrl+o")
    await driver.until(lambda: driver.app.screen.query_one(OfferTable).row_count)
    await driver.press("down", "down", "down")


async def settings(driver: Driver) -> None:
    """The second field is wrong, and the third has the focus."""
    await driver.press("f2", "tab", "x", "tab")


async def help_screen(driver: Driver) -> None:
    await driver.press("f1")


async def error(driver: Driver) -> None:
    """A model could not be loaded."""
    text = (
        "models/large.gguf: the model does not fit: it needs at least 3.1 GiB, and 2.0 GiB are "
        "free\nEnd other programs, or give a smaller context with /set context 4096"
    )
    driver.app.chat_screen.told(LoadFailed("large", text))
    await driver.until(lambda: len(driver.app.screen_stack) == 3)


async def confirm(driver: Driver) -> None:
    """Settings were changed, and Esc was pressed."""
    await driver.press("f2", "1", "escape")
    await driver.until(lambda: len(driver.app.screen_stack) == 4)


async def rename(driver: Driver) -> None:
    await chats(driver)
    await driver.press("r")
    await driver.until(lambda: len(driver.app.screen_stack) == 3)


async def completion(driver: Driver) -> None:
    """A command is begun; a text is attached."""
    driver.app.chat_screen.prompt.set_text("", (Attachment("notes.txt", "a", 1234),))
    await driver.type("/")
    await driver.press("down")


SMALL_SIZE, LARGE_SIZE = (80, 24), (200, 60)
Scene = Callable[[Driver], Coroutine[Any, Any, None]]
WITH_CHATS: dict[str, tuple[Scene, tuple[tuple[int, int], ...]]] = {
    "chat": (open_newest, (SMALL_SIZE, LARGE_SIZE)),
    "chat-top": (chat_top, (SMALL_SIZE,)),
    "chat-code": (chat_code, (SMALL_SIZE,)),
    "chat-folded": (chat_folded, (SMALL_SIZE, LARGE_SIZE)),
    "chats": (chats, (SMALL_SIZE, LARGE_SIZE)),
    "rename": (rename, (SMALL_SIZE, LARGE_SIZE)),
}
WITHOUT: dict[str, Scene] = {
    "empty": empty,
    "settings": settings,
    "help": help_screen,
    "error": error,
    "confirm": confirm,
    "completion": completion,
}
both_sizes = pytest.mark.parametrize(
    "size", [SMALL_SIZE, LARGE_SIZE], ids=lambda s: f"{s[0]}x{s[1]}"
)


@pytest.mark.parametrize(
    ("name", "size"), [(name, size) for name, (_, sizes) in WITH_CHATS.items() for size in sizes]
)
@in_loop
async def test_screens_with_chats(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    write_chats(tmp_path)
    async with running(tmp_path, size) as driver:
        await WITH_CHATS[name][0](driver)
        await check_screen(driver, name, tmp_path)


@both_sizes
@pytest.mark.parametrize("name", WITHOUT)
@in_loop
async def test_screens_without_chats(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    async with running(tmp_path, size) as driver:
        await WITHOUT[name](driver)
        await check_screen(driver, name, tmp_path)


@both_sizes
@in_loop
async def test_light_chat(tmp_path: Path, size: tuple[int, int]) -> None:
    write_chats(tmp_path)
    async with running(tmp_path, size, given=GREEDY | {"theme": "localds-light"}) as driver:
        await open_newest(driver)
        await check_screen(driver, "chat-light", tmp_path)


@both_sizes
@in_loop
async def test_machine_panel(tmp_path: Path, machine: Machine, size: tuple[int, int]) -> None:
    machine.reading = large_reading(Figures(52_000, 4_600, 30 * GIB, 3.1))
    async with running(tmp_path, size) as driver:
        await machine_panel(driver, machine)
        await check_screen(driver, "machine", tmp_path)


@both_sizes
@in_loop
async def test_models(tmp_path: Path, home: Path, size: tuple[int, int]) -> None:
    async with running(tmp_path, size) as driver:
        await models(driver, home)
        await check_screen(driver, "models", tmp_path)


def test_every_file_has_its_test() -> None:
    wide_and_narrow = [*WITHOUT, "chat-light", "machine", "models"]
    shown = [(name, size) for name, (_, sizes) in WITH_CHATS.items() for size in sizes]
    shown += [(name, size) for name in wide_and_narrow for size in (SMALL_SIZE, LARGE_SIZE)]
    names = {f"{name}-{width}x{height}.txt" for name, (width, height) in shown}
    assert {path.name for path in FOLDER.iterdir()} == names

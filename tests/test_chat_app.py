"""The chat app over the built-in model: asking, branches, stopping, going on, commands."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest
from chat_app import in_loop, running
from textual.events import MouseScrollUp

import localds
from localds.catalog.resolve import DEMO
from tui.store.conversations import ConversationStore

if TYPE_CHECKING:
    from pathlib import Path

QUESTION = "What is localds?"


@pytest.fixture(scope="module")
def expected() -> str:
    """The answer of the same model without the app."""
    with localds.load(DEMO) as model:
        messages = [{"role": "user", "content": QUESTION}]
        return "".join(p.text for p in model.session().generate(messages, temperature=0.0))


@in_loop
async def test_a_question_is_answered_and_kept(tmp_path: Path, expected: str) -> None:
    async with running(tmp_path) as driver:
        assert await driver.ask(QUESTION) == expected
        assert driver.shows("tokens/s")
    with ConversationStore(tmp_path / "chats.db") as store:
        (conversation,) = store.conversations()
        question, reply = store.branch(conversation.id)
    assert conversation.title == QUESTION
    assert (question.role, question.content) == ("user", QUESTION)
    assert (reply.content, reply.finish) == (expected, "stop")
    assert reply.stats["generated_tokens"] > 5


@in_loop
async def test_the_second_question_has_the_first_before_it(tmp_path: Path) -> None:
    async with running(tmp_path) as driver:
        first = await driver.ask(QUESTION)
        second = await driver.ask("And what is a GGUF file?")
        reused = driver.chat.last_run.stats.reused_tokens
    with localds.load(DEMO) as model:
        messages = [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "And what is a GGUF file?"},
        ]
        alone = "".join(p.text for p in model.session().generate(messages, temperature=0.0))
    assert second == alone
    assert reused > 10


@in_loop
async def test_typing_goes_on_while_a_reply_streams(tmp_path: Path) -> None:
    async with running(tmp_path) as driver:
        await driver.send("Tell me everything about localds")
        await driver.type("next")
        assert driver.app.chat_screen.prompt.text == "next"
        await driver.answered()
        assert driver.contents[1]


@in_loop
async def test_escape_stops_a_reply_and_it_can_go_on(tmp_path: Path, expected: str) -> None:
    async with running(tmp_path) as driver:
        await driver.send(QUESTION)
        await driver.until(lambda: len(driver.entries) == 2 and driver.entries[1].content)
        await driver.press("escape")
        assert driver.chat.replying is None
        part = driver.entries[1].content
        assert expected.startswith(part)
        if part != expected:
            assert driver.entries[1].note.startswith("stopped")
            await driver.press("ctrl+s")
            await driver.answered()
        assert driver.contents[1] == expected


@in_loop
async def test_a_reply_cut_at_its_limit_goes_on(tmp_path: Path, expected: str) -> None:
    async with running(tmp_path, given={"temperature": 0.0, "max_tokens": 4}) as driver:
        part = await driver.ask(QUESTION)
        assert part != expected
        assert driver.shows("cut at the token limit")
        await driver.send("/set max_tokens 500")
        await driver.send("/continue")
        await driver.answered()
        assert driver.contents[1] == expected


@in_loop
async def test_regenerating_makes_a_branch_and_both_stay(tmp_path: Path) -> None:
    async with running(tmp_path, given={"temperature": 1.5, "seed": 1}) as driver:
        first = await driver.ask(QUESTION)
        await driver.send("/set seed 2")
        await driver.press("ctrl+r")
        await driver.answered()
        second = driver.contents[1]
        assert second != first
        assert driver.entries[1].branch == (2, 2)
        await driver.press("ctrl+up", "left")
        await driver.until(lambda: driver.contents[1] == first)
        assert driver.entries[1].branch == (1, 2)
        await driver.press("ctrl+up", "right")
        await driver.until(lambda: driver.contents[1] == second)


@in_loop
async def test_editing_a_question_begins_a_branch_from_it(tmp_path: Path) -> None:
    async with running(tmp_path) as driver:
        old = await driver.ask(QUESTION)
        await driver.ask("Who made it?")
        await driver.press("ctrl+up")
        while driver.app.chat_screen.transcript.selected is not driver.entries[0]:
            await driver.press("up")
        await driver.press("e")
        assert driver.app.chat_screen.prompt.text == QUESTION
        assert driver.shows("editing")
        await driver.ask("What is a GGUF file?")
        assert driver.contents[0] == "What is a GGUF file?"
        assert len(driver.entries) == 2
        assert driver.entries[0].branch == (2, 2)
        await driver.press("ctrl+up", "up", "left")
        await driver.until(lambda: len(driver.entries) == 4)
        assert driver.contents[:2] == [QUESTION, old]


@in_loop
async def test_editing_can_be_left(tmp_path: Path) -> None:
    async with running(tmp_path) as driver:
        await driver.ask(QUESTION)
        await driver.press("ctrl+up", "e", "escape")
        assert driver.app.chat_screen.prompt.text == ""
        await driver.ask("Who made it?")
        assert len(driver.entries) == 4


@in_loop
async def test_a_chat_is_found_opened_renamed_deleted_and_brought_back(tmp_path: Path) -> None:
    async with running(tmp_path, size=(160, 40)) as driver:
        answer = await driver.ask(QUESTION)
        await driver.press("ctrl+n")
        await driver.ask("Who made it?")
        await driver.press("ctrl+b", "slash")
        await driver.type("what is loc")
        await driver.until(lambda: len(driver.app.chat_screen.sidebar.found) == 1)
        await driver.press("enter")
        await driver.press("enter")
        await driver.until(lambda: driver.contents == [QUESTION, answer])
        await driver.press("ctrl+b", "r")
        await driver.press("ctrl+a", "ctrl+k")
        await driver.type("about")
        await driver.press("enter")
        await driver.until(lambda: driver.shows("▸ about"))
        await driver.press("d")
        await driver.until(lambda: not driver.entries)
        await driver.press("u")
        await driver.until(lambda: driver.shows("about"))


@in_loop
async def test_commands_change_settings_and_say_what_is_wrong(tmp_path: Path) -> None:
    async with running(tmp_path) as driver:
        await driver.send("/set temperature hot")
        await driver.until(lambda: driver.shows("temperature: 'hot' is no number"))
        assert driver.app.chat_screen.prompt.text == "/set temperature hot"
        await driver.send("/set temperature 0.25")
        assert driver.app.layers().value("temperature") == 0.25
        assert driver.app.layers().source("temperature") == "this chat"
        await driver.send("/system Answer in one word.")
        await driver.ask(QUESTION)
        prompt = driver.chat.last_run.request.messages
        assert prompt[0] == {"role": "system", "content": "Answer in one word."}
        await driver.send("/nonsense")
        await driver.until(lambda: driver.shows("no such command"))


@in_loop
async def test_chats_are_exported_and_loaded_again(
    tmp_path: Path, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    async with running(tmp_path) as driver:
        await driver.ask(QUESTION)
        await driver.send("/export talk.json")
        await driver.send("/export")
        await driver.send("/save my talk")
        await driver.press("ctrl+n")
        await driver.send("/load talk.json")
        await driver.until(lambda: driver.contents == [QUESTION, expected])
        await driver.press("ctrl+n")
        await driver.send("/load my talk")
        await driver.until(lambda: driver.contents == [QUESTION, expected])
        await driver.send("/load nowhere")
        await driver.until(lambda: driver.shows("no chat has this name"))
    assert json.loads((tmp_path / "talk.json").read_text())["format"] == "localds-chat"
    assert expected.split(".")[0] in (tmp_path / "What-is-localds.md").read_text()


@in_loop
async def test_settings_of_a_model_and_of_all_are_remembered(tmp_path: Path) -> None:
    async with running(tmp_path, given={}) as driver:
        title = driver.app.loaded.title
        driver.app.store.save_settings("", {"temperature": 0.1, "top_k": 7})
        driver.app.store.save_settings(title, {"top_k": 9})
    async with running(tmp_path, given={}) as driver:
        layers = driver.app.layers()
        assert (layers.value("temperature"), layers.value("top_k")) == (0.1, 9)


@in_loop
async def test_a_context_of_this_chat_loads_the_model_again(tmp_path: Path) -> None:
    async with running(tmp_path) as driver:
        await driver.send("/set context 100")
        await driver.until(lambda: driver.app.engine.context_size == 100)
        await driver.send("word " * 200)
        await driver.answered()
        await driver.until(lambda: driver.entries and "context" in driver.entries[-1].note)
        assert driver.entries[-1].note.startswith("error: the prompt has")


@in_loop
async def test_another_model_is_loaded_without_a_restart(tmp_path: Path, tiny_model: Path) -> None:
    async with running(tmp_path) as driver:
        await driver.ask(QUESTION)
        await driver.send(f"/model {tiny_model}")
        await driver.until(lambda: driver.app.loaded and driver.app.loaded.name == str(tiny_model))
        assert driver.contents[0] == QUESTION


@in_loop
async def test_a_broken_file_is_told_and_the_app_goes_on(tmp_path: Path, expected: str) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    async with running(tmp_path, model=str(broken)) as driver:
        await driver.until(lambda: driver.shows("version 0 of GGUF is unknown"))
        await driver.press("escape")
        await driver.send(QUESTION)
        await driver.until(lambda: driver.shows("no model is loaded"))
        await driver.send(f"/model {DEMO}")
        await driver.until(lambda: driver.app.loaded is not None)
        assert await driver.ask(QUESTION) == expected


@in_loop
async def test_a_reopened_chat_needs_no_reading(tmp_path: Path) -> None:
    text = "Explain this: " + " ".join(f"word{i}" for i in range(300))
    async with running(tmp_path) as driver:
        await driver.ask(text)
        assert driver.chat.last_run.stats.reused_tokens < 20
        driver.app.engine.close()
    async with running(tmp_path) as driver:
        await driver.press("ctrl+b", "enter")
        await driver.until(lambda: driver.app.engine.context_used > 300)
        await driver.ask("Go on")
        stats = driver.chat.last_run.stats
        assert stats.reused_tokens > 0.9 * (stats.prompt_tokens - 20)


@in_loop
async def test_attached_files_reach_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("the secret is 42")
    async with running(tmp_path) as driver:
        await driver.ask("What says @notes.txt")
        assert "the secret is 42" in driver.chat.last_run.request.messages[-1]["content"]
        assert driver.shows("@ notes.txt")


@pytest.mark.parametrize("size", [(80, 24), (200, 60)])
def test_help_lists_every_key_and_command(tmp_path: Path, size: tuple[int, int]) -> None:
    @in_loop
    async def check() -> None:
        async with running(tmp_path, size=size) as driver:
            await driver.press("f1")
            seen = ""
            for _ in range(20):
                seen += "\n".join(driver.lines())
                await driver.press("pagedown")
            for command in driver.app.chat_screen.commands.all:
                assert f"/{command.name}" in seen
            for binding in driver.app.chat_screen.BINDINGS:
                assert binding.description in seen
            await driver.press("escape")

    check()


@in_loop
async def test_leaving_in_the_middle_of_a_reply_keeps_what_came(tmp_path: Path) -> None:
    started = time.monotonic()
    async with running(tmp_path) as driver:
        await driver.send("Tell me everything about localds")
        await driver.until(lambda: len(driver.entries) == 2 and driver.entries[1].content)
        shown = driver.entries[1].content
        driver.app.exit()
    with ConversationStore(tmp_path / "chats.db") as store:
        (conversation,) = store.conversations()
        reply = store.branch(conversation.id)[-1]
    assert reply.content.startswith(shown)
    assert reply.finish in ("stopped", "stop")
    assert time.monotonic() - started < 60


@in_loop
async def test_the_mouse_opens_chats_scrolls_and_presses_the_keys_below(tmp_path: Path) -> None:
    async with running(tmp_path, size=(160, 40)) as driver:
        await driver.ask(QUESTION)
        await driver.press("ctrl+n")
        await driver.ask("Who made it?")
        await driver.until(lambda: len(driver.app.chat_screen.sidebar.found) == 2)
        await driver.pilot.click("#sidebar OptionList", offset=(5, 1))
        await driver.until(lambda: driver.contents and driver.contents[0] == QUESTION)
        for _ in range(8):
            await driver.ask(QUESTION)
        transcript = driver.app.chat_screen.transcript
        end = transcript.scroll_y
        await driver.pilot._post_mouse_events([MouseScrollUp], "#transcript", button=0)
        await driver.until(lambda: transcript.scroll_y < end)
        await driver.pilot.click("FooterKey")
        await driver.until(lambda: driver.app.screen is not driver.app.chat_screen)


@in_loop
async def test_what_a_model_thinks_is_folded_kept_and_left_out_of_the_next_prompt(
    tmp_path: Path,
) -> None:
    """The built-in model does not think, so its own words are put between the tags."""
    async with running(tmp_path, given={"temperature": 0.0, "max_tokens": 3}) as driver:
        await driver.ask(QUESTION)
        reply = driver.chat.conversation.messages[-1]
        driver.app.store.update(reply.id, thinking="the user asks", thinking_seconds=2.0)
        driver.chat.open(reply.conversation)
        assert not driver.entries[1].unfolded
        await driver.until(lambda: driver.shows("thought for 2 s · 3 words"))
        await driver.press("ctrl+t")
        await driver.until(lambda: driver.shows("the user asks"))
        await driver.send("/set max_tokens 2")
        await driver.press("ctrl+s")
        await driver.answered()
        kept = driver.chat.conversation.messages[-1]
        assert kept.thinking == "the user asks"
        assert kept.content.startswith(reply.content)
        await driver.ask("And now?")
        assert driver.chat.last_run.request.messages[1]["content"] == kept.content

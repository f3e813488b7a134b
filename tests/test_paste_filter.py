"""Escape characters in a paste do nothing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from textual import events

from tui.paste_filter import PasteFilter, _Parser

START, END = "\x1b[200~", "\x1b[201~"
BITS = st.sampled_from(["a", "b\n", "\x1b", "[", "\x1b[", "20", "\x11", "\x1b[31m", "~", "\r"])


def heard(pieces: list[str]) -> list[events.Event]:
    parser = _Parser()
    return [event for piece in pieces for event in parser.feed(piece)]


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces, at = [], 0
    for number in range(len(text)):
        size = sizes[number % len(sizes)]
        pieces.append(text[at : at + size])
        at += size
        if at >= len(text):
            break
    return pieces


@settings(max_examples=300, deadline=None)
@given(st.lists(BITS, max_size=20), st.lists(st.integers(1, 9), min_size=1))
def test_a_paste_is_one_event_however_it_is_cut(bits: list[str], sizes: list[int]) -> None:
    pasted = "".join(bits)
    if END in pasted or START in pasted:
        return
    found = heard(cut(f"x{START}{pasted}{END}y", sizes))
    assert [type(event) for event in found] == [events.Key, events.Paste, events.Key]
    assert found[1].text == pasted.replace("\x1b", "")


@given(st.lists(BITS, max_size=20), st.lists(st.integers(1, 9), min_size=1))
def test_what_is_no_paste_passes_as_it_is(bits: list[str], sizes: list[int]) -> None:
    text = "".join(bits)
    cleaner = PasteFilter()
    assert "".join(cleaner.clean(piece) for piece in cut(text, sizes)) == text


@pytest.mark.parametrize("hostile", ["\x1b\x11", "\x1b[1;32mok\x1b[0m \x07\x11\x03", "\x1b\r"])
def test_keys_in_a_paste_are_not_pressed(hostile: str) -> None:
    (event,) = heard([f"{START}{hostile}{END}"])
    assert isinstance(event, events.Paste)

"""Thinking and answer are told apart, however the text is cut."""

from __future__ import annotations

import re
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localds.thinking import ThinkingSplitter


def split(pieces: list[str], **options: bool) -> list[tuple[str, str]]:
    splitter = ThinkingSplitter(**options)
    parts = [part for piece in pieces for part in splitter.push(piece)] + splitter.flush()
    assert all(text for _, text in parts)
    runs = groupby(parts, key=lambda part: part[0])
    return [(kind, "".join(text for _, text in run)) for kind, run in runs]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", []),
        ("Hello", [("answer", "Hello")]),
        ("<think>hm</think>Hi", [("thinking", "hm"), ("answer", "Hi")]),
        ("<think></think>\n\nHi", [("answer", "\n\nHi")]),
        ("\n <think>\nhm\n</think>\n\nHi", [("thinking", "\n \nhm\n"), ("answer", "\n\nHi")]),
        ("<think>never closed", [("thinking", "never closed")]),
        ("<think>ends in </thin", [("thinking", "ends in </thin")]),
        ("<thin", [("answer", "<thin")]),
        ("  ", [("answer", "  ")]),
        ("I wrap it in <think>x</think>.", [("answer", "I wrap it in <think>x</think>.")]),
        ("a</think>b", [("answer", "a</think>b")]),
        ("<think>a<think>b</think>c", [("thinking", "a<think>b"), ("answer", "c")]),
        ("<think>a</think><think>b</think>c", [("thinking", "ab"), ("answer", "c")]),
        ("[THINK]hm </think>[/THINK]Hi", [("thinking", "hm </think>"), ("answer", "Hi")]),
        ("<<think>a", [("answer", "<<think>a")]),
    ],
)
def test_a_reply_is_split(text: str, wanted: list[tuple[str, str]]) -> None:
    assert split([text]) == wanted
    assert split(list(text)) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("hm</think>Hi", [("thinking", "hm"), ("answer", "Hi")]),
        ("hm[/THINK]Hi", [("thinking", "hm"), ("answer", "Hi")]),
        ("</think>Hi", [("answer", "Hi")]),
        ("all of it", [("thinking", "all of it")]),
        ("hm</think> <think>more</think>Hi", [("thinking", "hm more"), ("answer", "Hi")]),
    ],
)
def test_a_reply_may_start_inside(text: str, wanted: list[tuple[str, str]]) -> None:
    assert split([text], starts_inside=True) == wanted
    assert split(list(text), starts_inside=True) == wanted


def by_definition(text: str, inside: bool) -> list[tuple[str, str]]:
    """The whole text split with a pattern for each state."""
    parts = []
    while True:
        if inside:
            thought, tag, text = text.partition("</think>")
            parts.append(("thinking", thought))
            if not tag:
                break
            inside = False
        elif opening := re.match(r"(\s*)<think>", text):
            parts.append(("thinking", opening[1]))
            text = text[opening.end() :]
            inside = True
        else:
            parts.append(("answer", text))
            break
    runs = groupby((part for part in parts if part[1]), key=lambda part: part[0])
    return [(kind, "".join(text for _, text in run)) for kind, run in runs]


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(
        st.sampled_from(["<think>", "</think>", "<", "/", "think", ">", " ", "\n", "x", "<thi"])
    ),
    inside=st.booleans(),
)
def test_pieces_do_not_matter(pieces: list[str], inside: bool) -> None:
    whole = "".join(pieces)
    wanted = by_definition(whole, inside)
    for cut in (pieces, [whole], list(whole)):
        assert split(cut, starts_inside=inside) == wanted


def test_text_comes_out_as_soon_as_it_is_certain() -> None:
    splitter = ThinkingSplitter()
    assert splitter.push(" <thi") == []
    assert splitter.push("nk>so") == [("thinking", " so")]
    assert splitter.push(" on <") == [("thinking", " on ")]
    assert splitter.push("b") == [("thinking", "<b")]
    assert splitter.push("</think>A") == [("answer", "A")]
    assert splitter.push("<think>") == [("answer", "<think>")]


def test_other_tags() -> None:
    splitter = ThinkingSplitter(tags=[("«", "»")])
    assert splitter.push("«a»<think>") == [("thinking", "a"), ("answer", "<think>")]
    with pytest.raises(ValueError, match="empty"):
        ThinkingSplitter(tags=[("", "x")])

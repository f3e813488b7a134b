"""What is completed at a cursor, with which candidates, and which files a text names."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tui.completion import (
    MAX_CANDIDATES,
    AttachedPath,
    Candidate,
    Target,
    attached_paths,
    complete,
    mention_of,
    mentions,
    mentions_of,
    path_candidates,
    target_at,
)

HOSTILE = [
    "new\nline",
    "[bold]x[bold]",
    "two words",
    'quo"te',
    "back\\slash n",
    "grün-日本",
    "\x1b[31m",
]


@dataclass
class Command:
    name: str
    summary: str = ""
    arguments: list[str] = field(default_factory=list)

    def complete(self, prefix: str) -> list[str]:
        return [text for text in self.arguments if text.startswith(prefix)]


COMMANDS = [Command("model", "choose", ["v2 lite", "v3"]), Command("more"), Command("help")]


def at_end(line: str, first_line: bool = True) -> Target | None:
    return target_at(line, len(line), first_line=first_line)


def inserts(found: list[Candidate]) -> list[str]:
    return [candidate.insert for candidate in found]


# --- what is being completed


def test_a_slash_begins_a_command_only_at_the_beginning_of_the_input() -> None:
    assert at_end("/") == Target("command", 0, 1, "")
    assert at_end("/mo") == Target("command", 0, 3, "mo")
    assert at_end("/mo", first_line=False) is None
    assert at_end(" /mo") is None
    assert at_end("a /mo") is None
    assert target_at("/mo", 0, first_line=True) is None


def test_the_whole_word_is_replaced_when_the_cursor_is_inside() -> None:
    assert target_at("/model x", 3, first_line=True) == Target("command", 0, 6, "mo")
    assert target_at("see @notes.txt now", 7, first_line=True) == Target("path", 4, 14, "no")
    assert target_at("(see @no)", 8, first_line=True) == Target("path", 5, 8, "no")


def test_after_the_command_comes_its_argument() -> None:
    assert at_end("/model ") == Target("argument", 7, 7, "", command="model")
    assert at_end("/model v2 l") == Target("argument", 7, 11, "v2 l", command="model")
    assert at_end("/model   v") == Target("argument", 9, 10, "v", command="model")
    assert at_end("/model @a") == Target("path", 7, 9, "a")


@pytest.mark.parametrize("line", ["me@example.org", "a@", "word", "", "@a b", 'x @"a b" '])
def test_no_path_inside_or_behind_a_word(line: str) -> None:
    assert at_end(line) is None


def test_paths_plain_and_quoted() -> None:
    assert at_end("@") == Target("path", 0, 1, "")
    assert at_end("see @src/a") == Target("path", 4, 10, "src/a")
    assert at_end("(@a") == Target("path", 1, 3, "a")
    assert at_end('x @"my f') == Target("path", 2, 8, "my f", quoted=True)
    assert at_end('@"a b" @"c d') == Target("path", 7, 12, "c d", quoted=True)
    assert at_end(r'@"a\"b') == Target("path", 0, 6, 'a"b', quoted=True)
    assert target_at('@"my f" x', 6, first_line=True) == Target("path", 0, 7, "my f", quoted=True)


def test_a_line_of_a_megabyte_is_no_burden() -> None:
    assert at_end("@" * 1_000_000) is not None
    assert at_end("word " * 200_000 + "@ab") == Target("path", 1_000_000, 1_000_003, "ab")


# --- commands


def test_commands_that_begin_with_what_was_typed_in_the_given_order() -> None:
    found = complete(Target("command", 0, 3, "mo"), COMMANDS, Path())
    assert found.candidates == (
        Candidate("/model", "/model", "choose"),
        Candidate("/more", "/more", ""),
    )
    assert (found.start, found.end, found.more) == (0, 3, False)
    assert not complete(Target("command", 0, 3, "home/x"), COMMANDS, Path()).candidates


def test_arguments_come_from_the_command() -> None:
    target = Target("argument", 7, 9, "v2", command="model")
    assert complete(target, COMMANDS, Path()).candidates == (Candidate("v2 lite", "v2 lite"),)
    unknown = Target("argument", 7, 9, "v2", command="absent")
    assert complete(unknown, COMMANDS, Path()).candidates == ()


# --- paths


def test_folders_first_then_files_by_name_without_hidden_ones(tmp_path: Path) -> None:
    for name in ("b.txt", "A.txt", ".hidden"):
        (tmp_path / name).write_text("12345")
    for name in ("zoo", ".git"):
        (tmp_path / name).mkdir()
    assert path_candidates("", tmp_path) == [
        Candidate("@zoo/", "zoo/", "folder"),
        Candidate("@A.txt", "A.txt", "5 B"),
        Candidate("@b.txt", "b.txt", "5 B"),
    ]
    assert inserts(path_candidates(".", tmp_path)) == ["@.git/", "@.hidden"]
    assert inserts(path_candidates("a", tmp_path)) == ["@A.txt"]


def test_paths_below_absolute_and_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "main.py").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "src"))
    assert inserts(path_candidates("src/m", tmp_path)) == ["@src/main.py"]
    assert inserts(path_candidates("../src/", tmp_path / "src")) == ["@../src/main.py"]
    assert inserts(path_candidates(f"{tmp_path}/s", Path("/"))) == [f"@{tmp_path}/src/"]
    assert inserts(path_candidates("~", tmp_path)) == ["@~/"]
    assert inserts(path_candidates("~/m", tmp_path)) == ["@~/main.py"]


def test_what_cannot_be_listed_has_no_candidates(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for prefix in ("absent/", "file/", "~nobody-of-this-name/", "a\0/", "x" * 5000 + "/"):
        assert path_candidates(prefix, tmp_path) == []


def test_special_files_and_broken_links_are_listed_with_a_remark(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    details = {found.shown: found.detail for found in path_candidates("", tmp_path)}
    assert details == {"link": "broken link", "pipe": "device or pipe"}


def test_at_most_200_are_listed_the_first_by_name(tmp_path: Path) -> None:
    for number in range(MAX_CANDIDATES + 50):
        (tmp_path / f"f{number:03}").touch()
    found = complete(Target("path", 0, 1, ""), (), tmp_path)
    assert len(found.candidates) == MAX_CANDIDATES == 200
    assert found.more
    assert found.candidates[0].insert == "@f000"
    assert found.candidates[-1].insert == "@f199"
    assert not complete(Target("path", 0, 1, "f24"), (), tmp_path).more


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_completed_to_what_names_them_again(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    (found,) = path_candidates("", tmp_path)
    assert found.insert.isprintable()
    assert found.shown.isprintable()
    text = f"see {found.insert} please"
    assert attached_paths(text, tmp_path) == [AttachedPath(name, tmp_path / name)]


def test_names_that_are_not_utf8_can_be_named(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/caf\xe9"
    try:
        Path(os.fsdecode(raw)).touch()
    except OSError:
        pytest.skip("this file system takes only names in UTF-8")
    (found,) = path_candidates("", tmp_path)
    found.insert.encode()
    (attached,) = attached_paths(found.insert, tmp_path)
    assert os.fsencode(attached.path) == raw


def test_a_quoted_folder_stays_open_for_its_files(tmp_path: Path) -> None:
    (tmp_path / "my folder").mkdir()
    (tmp_path / "my folder" / "a b.txt").touch()
    (folder,) = path_candidates("my", tmp_path)
    assert folder.insert == '@"my folder/'
    target = at_end(folder.insert)
    assert target is not None
    (file,) = complete(target, (), tmp_path).candidates
    assert file.insert == '@"my folder/a b.txt"'


def test_quotes_that_were_typed_are_kept(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    assert inserts(path_candidates("p", tmp_path, quoted=True)) == ['@"plain"']


# --- mentions


@given(st.text(min_size=1).filter(lambda name: not name.endswith("/")))
@example('a"b\\c\n\udcff\U0010ffff')
@example("u0041")
@example("\\u0041")
def test_every_name_can_be_written_and_read_again(name: str) -> None:
    (mention,) = mentions(f"x {mention_of(name)} y")
    assert mention.name == name
    quoted = mention_of(name, quoted=True)
    assert [m.name for m in mentions(quoted)] == [name]


def test_mentions_know_their_place() -> None:
    text = 'a @b, (@c) @"d e" f@g @ @"open'
    found = [(m.name, text[m.start : m.end]) for m in mentions(text)]
    assert found == [("b,", "@b,"), ("c)", "@c)"), ("d e", '@"d e"')]
    (b,) = mentions_of("b", text)
    assert text[b.start : b.end] == "@b"
    assert mentions_of("absent", text) == []


def test_only_words_that_name_files_are_attached(tmp_path: Path) -> None:
    for name in ("notes.txt", "a b", "odd.)"):
        (tmp_path / name).touch()
    (tmp_path / "app").mkdir()
    text = (
        '@notes.txt, (see @notes.txt) @"a b" @odd.) me@notes.txt @dataclass @app @absent.txt '
        f"@{tmp_path}/notes.txt?! @" + "x" * 9000
    )
    names = [attached.name for attached in attached_paths(text, tmp_path)]
    assert names == ["notes.txt", "a b", "odd.)", f"{tmp_path}/notes.txt"]


def test_what_was_clearly_meant_as_a_file_is_found_so_that_reading_tells(tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    os.mkfifo(tmp_path / "pipe")
    names = [a.name for a in attached_paths("@app/ @pipe @/dev/zero", tmp_path)]
    assert names == ["app/", "pipe", "/dev/zero"]


@pytest.mark.timeout(20)
def test_a_message_full_of_at_signs_does_not_hang(tmp_path: Path) -> None:
    for text in ("@" + "." * 1_000_000, "@a " * 300_000, '@"' * 300_000, "(" * 500_000 + "@"):
        assert attached_paths(text, tmp_path) == []

r"""What can be completed at a cursor, and the files that a text names.

`/name` at the beginning of an input is a command; `@path` at the beginning of a word is a file.
A path with spaces or unusual characters stands in quotes, `@"my file.txt"`, where a backslash
escapes: `\"`, `\\`, `\n`, `\t`, `\r`, `\uXXXX` and `\UXXXXXXXX`.
"""

from __future__ import annotations

import heapq
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from localds.units import format_size
from tui.attachments import one_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MAX_CANDIDATES = 200
_WINDOW = 4096  # Characters before the cursor that are looked at: as long as a path may be.

_AT = r"(?:(?<!\S)|(?<=[(\[{]))@"
_MENTION = re.compile(_AT + r'(?:"(?P<quoted>(?:[^"\\\n]|\\.)*)"|(?P<plain>[^\s"]\S*))')
_OPEN_QUOTED = re.compile(_AT + r'"(?P<quoted>(?:[^"\\]|\\.)*)$')
_OPEN_PLAIN = re.compile(_AT + r'(?P<plain>(?:[^\s"]\S*)?)$')
_REST_OF_WORD = re.compile(r"[^\s)\]},;]*")
_ENDS_OF_WORDS = ".,;:!?)]}>'\""
_MAX_ENDS = 8

_HEX = "[0-9a-fA-F]"
_ESCAPE = re.compile(
    rf"\\(?:u(?P<four>{_HEX}{{4}})|U(?P<eight>00(?:0{_HEX}|10){_HEX}{{4}})|(?P<one>.))"
)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r"}
_ESCAPES = {character: name for name, character in _ESCAPED.items()}


class Command(Protocol):
    """A slash command: `name` is without the slash."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def summary(self) -> str: ...  # noqa: D102
    def complete(self, prefix: str) -> list[str]:
        """Whole arguments that begin with `prefix`; called in a worker. Empty for none."""
        ...


@dataclass(frozen=True, slots=True)
class Target:
    """What is being typed at the cursor: `line[start:end]` would be replaced.

    `prefix` is what candidates must begin with: a command's name, an argument, or a path without
    its `@`, quotes and escapes. `command` names the command that an argument is for.
    """

    kind: Literal["command", "argument", "path"]
    start: int
    end: int
    prefix: str
    command: str = ""
    quoted: bool = False


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to complete: the text to insert, what the list shows, and a remark beside it."""

    insert: str
    shown: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Completion:
    """Candidates for `line[start:end]`; `more` where others were left out."""

    start: int
    end: int
    candidates: tuple[Candidate, ...]
    more: bool = False


@dataclass(frozen=True, slots=True)
class Mention:
    """An `@name` in a text: `text[start:end]`, from the `@` to the last quote."""

    name: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class AttachedPath:
    """A path that a text names, as it was written and where it leads."""

    name: str
    path: Path


def target_at(line: str, column: int, *, first_line: bool) -> Target | None:
    """What is being completed in front of `column`, or None."""
    before = line[max(0, column - _WINDOW) : column]
    offset = column - len(before)
    if match := _OPEN_QUOTED.search(before):
        end = column + line.startswith('"', column)
        prefix = _unescaped(match["quoted"])
        return Target("path", offset + match.start(), end, prefix, quoted=True)
    if match := _OPEN_PLAIN.search(before):
        return Target("path", offset + match.start(), _word_end(line, column), match["plain"])
    if first_line and line.startswith("/") and column > 0:
        return _command_target(line, column)
    return None


def complete(target: Target, commands: Sequence[Command], folder: Path) -> Completion:
    """The candidates for a target. Reads a folder or asks the command, except for command names."""
    match target.kind:
        case "command":
            found = _command_candidates(target.prefix, commands)
        case "argument":
            found = _argument_candidates(target, commands)
        case "path":
            found = path_candidates(target.prefix, folder, quoted=target.quoted)
    more = len(found) > MAX_CANDIDATES
    return Completion(target.start, target.end, tuple(found[:MAX_CANDIDATES]), more)


def path_candidates(prefix: str, folder: Path, *, quoted: bool = False) -> list[Candidate]:
    """Files and folders whose path begins with `prefix`, relative to `folder`; folders first.

    Upper and lower case are not told apart. At most one more than `MAX_CANDIDATES`, so that the
    caller can tell that there are more. Nothing for a folder that cannot be read.
    """
    if prefix == "~":
        return [Candidate("@~/", "~/", "home folder")]
    head, slash, fragment = prefix.rpartition("/")
    head += slash
    base = resolve(head, folder)
    if base is None:
        return []
    try:
        with os.scandir(base) as entries:
            matching = (
                (not _is_folder(e), e.name.casefold(), e.name, e)
                for e in entries
                if _matches(e.name, fragment)
            )
            first = heapq.nsmallest(MAX_CANDIDATES + 1, matching, key=lambda item: item[:3])
    except (OSError, ValueError):
        return []
    return [_path_candidate(head, entry, quoted) for *_, entry in first]


def mentions(text: str) -> list[Mention]:
    """All `@names` in a text, whether or not there are such files."""
    return [
        Mention(_mentioned(match), match.start(), match.end()) for match in _MENTION.finditer(text)
    ]


def mentions_of(name: str, text: str) -> list[Mention]:
    """Where a text mentions this name; punctuation after it does not count."""
    return [
        Mention(name, mention.start, mention.end - len(mention.name) + len(name))
        for mention in mentions(text)
        if name in _readings(mention.name)
    ]


def attached_paths(text: str, folder: Path) -> list[AttachedPath]:
    """The files that a message names by `@path`, each once; looks at the disk.

    A word that names no file stays plain text: an e-mail address, a decorator, a folder without a
    final slash. A device, a pipe, a folder with its slash and what lies in a closed folder count
    as files here, so that reading them tells what is wrong.
    """
    found: dict[str, AttachedPath] = {}
    for written in dict.fromkeys(mention.name for mention in mentions(text)):
        for name in _readings(written):
            path = resolve(name, folder)
            if path is not None and _names_a_file(name, path):
                found.setdefault(name, AttachedPath(name, path))
                break
    return list(found.values())


def resolve(name: str, folder: Path) -> Path | None:
    """Where a written path leads from `folder`; None for the home of an unknown user."""
    try:
        return folder / Path(name).expanduser()
    except RuntimeError:
        return None


def mention_of(path: str, *, quoted: bool = False) -> str:
    """How a path is written in a text, in quotes where it must or should be.

    The quote after a folder's slash is left open, since its files come next.
    """
    if not quoted and path.isprintable() and not any(c.isspace() or c == '"' for c in path):
        return f"@{path}"
    return f'@"{_escaped(path)}' + ("" if path.endswith("/") else '"')


def _word_end(line: str, column: int) -> int:
    match = _REST_OF_WORD.match(line, column)
    return match.end() if match else column


def _command_target(line: str, column: int) -> Target:
    word, space, rest = line[:column].partition(" ")
    if not space:
        return Target("command", 0, _word_end(line, column), word[1:])
    argument = rest.lstrip(" ")
    return Target("argument", column - len(argument), len(line), argument, command=word[1:])


def _command_candidates(prefix: str, commands: Iterable[Command]) -> list[Candidate]:
    return [
        Candidate(f"/{command.name}", f"/{command.name}", one_line(command.summary))
        for command in commands
        if command.name.startswith(prefix.lower())
    ]


def _argument_candidates(target: Target, commands: Iterable[Command]) -> list[Candidate]:
    for command in commands:
        if command.name == target.command:
            return [Candidate(text, one_line(text)) for text in command.complete(target.prefix)]
    return []


def _matches(name: str, fragment: str) -> bool:
    if name.startswith(".") and not fragment.startswith("."):
        return False
    return name.casefold().startswith(fragment.casefold())


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _path_candidate(head: str, entry: os.DirEntry[str], quoted: bool) -> Candidate:
    slash = "/" if _is_folder(entry) else ""
    insert = mention_of(f"{head}{entry.name}{slash}", quoted=quoted)
    return Candidate(insert, one_line(entry.name) + slash, _detail(entry))


def _detail(entry: os.DirEntry[str]) -> str:
    try:
        status = entry.stat()
    except OSError:
        return "broken link"
    if stat.S_ISDIR(status.st_mode):
        return "folder"
    return format_size(status.st_size) if stat.S_ISREG(status.st_mode) else "device or pipe"


def _mentioned(match: re.Match[str]) -> str:
    plain: str | None = match["plain"]
    return _unescaped(match["quoted"]) if plain is None else plain


def _readings(word: str) -> list[str]:
    """The word, then the word without one, two, ... of the punctuation marks at its end."""
    if len(word) > _WINDOW:
        return []
    shortest = max(len(word.rstrip(_ENDS_OF_WORDS)), len(word) - _MAX_ENDS, 1)
    return [word[:length] for length in range(len(word), shortest - 1, -1)]


def _names_a_file(name: str, path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return not stat.S_ISDIR(mode) or name.endswith("/")


def _escaped(path: str) -> str:
    return "".join(_escaped_character(character) for character in path)


def _escaped_character(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    if character.isprintable():
        return character
    if character in _ESCAPES:
        return f"\\{_ESCAPES[character]}"
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _unescaped(text: str) -> str:
    return _ESCAPE.sub(_unescaped_match, text)


def _unescaped_match(match: re.Match[str]) -> str:
    code: str | None = match["four"] or match["eight"]
    if code is not None:
        return chr(int(code, 16))
    return _ESCAPED.get(match["one"], match["one"])

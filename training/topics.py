"""What can be asked and what is answered: topics/*.toml, and what follows from localds itself.

An intent is one thing that people want to know. Written ones come from the topics; those on
options and commands are made from the program's own help, those on models from models.toml.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localds.catalog.known import read_models, shipped_file
from localds.memory.plan import estimate
from localds.units import format_size
from training.facts import Command, Option, commands

if TYPE_CHECKING:
    from collections.abc import Iterator

    from localds.catalog.known import KnownModel

TOPICS = Path(__file__).parent / "topics"
QUESTIONS = Path(__file__).parent / "evaluation" / "questions.toml"
NOT_INTENTS = ("frames.toml", "misspellings.toml", "models.toml")

# How often an intent is drawn, beside 1 for an ordinary one.
WEIGHTS = {
    "general-knowledge": 4.0,
    "write-code": 1.5,
    "writing": 1.5,
    "advice": 1.5,
    "current": 1.5,
    "nonsense": 1.5,
    "hello": 1.5,
}
_OPTION_WEIGHT = 0.3
_MODEL_WEIGHT = 0.15


@dataclass(frozen=True, slots=True)
class Intent:
    """One thing that people ask: phrasings, answers, and what a right answer must name.

    `do` are verb phrases ("download a model") that go into frames, `questions` whole utterances,
    `short` keywords. `fills` are the values of slots, one set of which is put into question and
    answer alike. `expect` are regular expressions.
    """

    id: str
    expect: tuple[str, ...]
    answers: tuple[str, ...]
    do: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    short: tuple[str, ...] = ()
    fills: tuple[dict[str, str], ...] = field(default=({},))
    weight: float = 1.0


def load_intents() -> list[Intent]:
    """Every intent, without the phrasings that the evaluation happens to have, too.

    Raises `ValueError` where an answer does not name what it must.
    """
    frames = load_frames()
    intents = [
        *_written(),
        *_options(frames["option"]),
        *_commands(frames["command"]),
        *_models(),
    ]
    for intent in intents:
        _check(intent)
    with QUESTIONS.open("rb") as file:
        asked = {words(entry["text"]) for entry in tomllib.load(file)["question"]}
    return [_without(asked, intent) for intent in intents]


def load_frames() -> dict[str, Any]:
    """topics/frames.toml: how people wrap a request."""
    return _read("frames.toml")


def load_misspellings() -> dict[str, list[str]]:
    """topics/misspellings.toml: words, and how people write them in haste."""
    misspellings: dict[str, list[str]] = _read("misspellings.toml")["misspellings"]
    return misspellings


def fill(text: str, values: dict[str, str]) -> str:
    """Put values into the slots of a text."""
    for slot, value in values.items():
        text = text.replace(f"{{{slot}}}", value)
    return text


def words(text: str) -> tuple[str, ...]:
    """The words of a text, without marks and capitals: alike for what only looks different."""
    return tuple(re.findall(r"[\w-]+", text.casefold()))


def _without(asked: set[tuple[str, ...]], intent: Intent) -> Intent:
    """Hold out whatever is in `asked`; single words, for which there is no other way, stay."""

    def keep(phrase: str) -> bool:
        said = {words(fill(phrase, values)) for values in intent.fills}
        return not any(len(text) > 1 for text in said & asked)

    kept = {
        name: tuple(filter(keep, getattr(intent, name))) for name in ("do", "questions", "short")
    }
    return replace(intent, **kept)


def _read(name: str) -> dict[str, Any]:
    with (TOPICS / name).open("rb") as file:
        return tomllib.load(file)


def _entry(entry: dict[str, Any]) -> Intent:
    lists = {key: tuple(entry[key]) for key in ("expect", "answers", "do", "questions", "short")}
    return Intent(id=entry["id"], weight=WEIGHTS.get(entry["id"], 1.0), **lists)


def _written() -> Iterator[Intent]:
    for path in sorted(TOPICS.glob("*.toml")):
        if path.name not in NOT_INTENTS:
            yield from map(_entry, _read(path.name)["intent"])


def _options(frames: list[str]) -> Iterator[Intent]:
    """One intent per option and meaning; commands that share both share the intent."""
    meanings: dict[tuple[str, str, str], list[Option]] = {}
    for command in commands():
        for option in command.options:
            meanings.setdefault((option.name, option.help, option.default), []).append(option)
    names = [name for name, _, _ in meanings]
    for (name, text, default), options in meanings.items():
        unique = names.count(name) == 1
        told = _sentence(text) + (f" Default: {default}." if default else "")
        users = ", ".join(option.command for option in options)
        first = options[0]
        forms = " or ".join(f"`{form}`" for form in sorted(first.names, key=len, reverse=True))
        yield Intent(
            id=f"option-{first.command}{name}",
            expect=(re.escape(name),),
            answers=(
                f"{forms}, an option of localds {users}: {told}",
                f"`localds {first.command} {name}`: {told} `localds {first.command} --help` "
                "lists all options.",
            ),
            questions=tuple(frame for frame in frames if unique or "{command}" in frame),
            fills=tuple(
                {"option": form, "command": option.command}
                for option in options
                for form in option.names
                if len(form) > 2 or not unique
            )
            or ({"option": name, "command": first.command},),
            weight=_OPTION_WEIGHT,
        )


def _commands(frames: list[str]) -> Iterator[Intent]:
    for command in commands():
        yield Intent(
            id=f"command-{command.name}",
            expect=(f"localds {command.name}",),
            answers=(
                f"`localds {command.name}`: {_sentence(command.help)} "
                f"`localds {command.name} --help` lists its options.",
                _usage(command),
            ),
            questions=tuple(frames),
            fills=({"command": command.name},),
        )


def _usage(command: Command) -> str:
    names = [f"`{option.name}`" for option in command.options]
    listed = f" Among its options are {', '.join(names[:4])}." if names else ""
    return f"`localds {command.name}` does this: {_sentence(command.help)}{listed}"


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?", "!")) else text + "."


def _models() -> Iterator[Intent]:
    """The intents of topics/models.toml for each known model."""
    topics = _read("models.toml")
    for model, entry in product(read_models(shipped_file()).values(), topics["intent"]):
        intent = _entry(entry)
        phrasings = (*intent.do, *intent.questions, *intent.short)
        quants = list(model.quants) if any("{quant}" in p for p in phrasings) else [model.default]
        names = topics["aliases"].get(model.name, [model.name])
        yield replace(
            intent,
            id=f"{intent.id}-{model.name}",
            fills=tuple(
                _model_values(model, quant) | {"called": called}
                for called, quant in product(names, quants)
            ),
            weight=_MODEL_WEIGHT,
        )


def _model_values(model: KnownModel, quant: str) -> dict[str, str]:
    return {
        "name": model.name,
        "title": model.title,
        "quant": quant,
        "size": format_size(model.quants[quant].size),
        "memory": format_size(estimate(model.quants[quant].size)),
        "context": str(model.context),
        "license": model.license,
        "parameters": model.parameters,
        "repository": model.repository,
    }


def _check(intent: Intent) -> None:
    if not intent.questions and not intent.short and not intent.do:
        raise ValueError(f"{intent.id}: nobody asks this; give it phrasings")
    for values in intent.fills:
        expect = [fill(e, {k: re.escape(v) for k, v in values.items()}) for e in intent.expect]
        for answer in intent.answers:
            text = fill(answer, values)
            for pattern in expect:
                if not re.search(pattern, text, re.IGNORECASE):
                    raise ValueError(f"{intent.id}: {text!r} does not name {pattern!r}")

"""The settings of a chat: one declaration for defaults, checks and the settings screen.

They are looked up in layers, from this chat's own to the defaults; see `Layers`.
"""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from localds.units import parse_size
from tui.themes import theme_names

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Kind = Literal["number", "integer", "switch", "choice", "size", "text", "lines"]
Section = Literal["Sampling", "Reply", "Memory", "Display"]

DEFAULT = "default"  # the name of the last layer

_SWITCH = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}
_ESCAPES = {r"\n": "\n", r"\r": "\r", r"\t": "\t", r"\s": " ", r"\\": "\\"}
_BLANKS = " \t\r"
_MAX = sys.float_info.max


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: `label` and `help` for people, and which values it may have.

    Values by `kind`: "number" float, "integer" int, "switch" bool, "choice" one of `choices` (any
    text where there are none), "size" a text such as "12GiB", "text" str of several lines, "lines"
    a tuple of texts. `minimum` and `maximum` are allowed themselves, but with `above` the minimum
    is not. A `default` of None leaves the value open. After a change of one that `needs_reload`,
    the model has to be loaded again.
    """

    key: str
    label: str
    kind: Kind
    default: Any
    help: str
    section: Section
    minimum: int | None = None
    maximum: int | None = None
    choices: tuple[str, ...] = ()
    needs_reload: bool = False
    above: bool = False

    def parse(self, text: str) -> Any:
        r"""The value that a person wrote; None for blanks, which mean "not set".

        Of "lines", each line is one text, without the blanks around it; in it \n is a new line,
        \t a tab, \r a carriage return, \s a space and \\ a backslash. Raises `ValueError` with a
        message to show under the field.
        """
        return self.check(self._read(text)) if text.strip(_BLANKS + "\n") else None

    def format(self, value: Any) -> str:
        """The text that `parse` reads as this value; empty for None."""
        match value:
            case None:
                return ""
            case bool():
                return "yes" if value else "no"
            case float():
                return repr(value).removesuffix(".0")
            case tuple() | list():
                return _format_lines(value)
            case _:
                return str(value)

    def check(self, value: Any) -> Any:
        """The value, maybe one read from JSON, as it is used; raises `ValueError`."""
        match self.kind:
            case "number" | "integer":
                return self._check_number(value)
            case "lines":
                return self._check_lines(value)
            case "switch" if not isinstance(value, bool):
                raise self._wrong(value, "is neither yes nor no")
            case "choice" if not isinstance(value, str) or not self._offers(value):
                raise self._wrong(value, f"is unknown; choose {' or '.join(self.choices)}")
            case "text" if not isinstance(value, str):
                raise self._wrong(value, "is no text")
            case "size":
                self._check_size(value)
        return value

    def _read(self, text: str) -> Any:
        word = text.strip()
        match self.kind:
            case "number" | "integer":
                try:
                    return float(word) if self.kind == "number" else int(word)
                except ValueError:
                    raise self._no_number(word) from None
            case "switch":
                return _SWITCH.get(word.lower(), word)
            case "lines":
                return self._read_lines(text)
            case "text":
                return text
            case _:
                return word

    def _read_lines(self, text: str) -> tuple[str, ...]:
        lines = (line.strip(_BLANKS) for line in text.split("\n"))
        return tuple(self._unescape(line) for line in lines if line)

    def _unescape(self, line: str) -> str:
        def character(match: re.Match[str]) -> str:
            if match[0] not in _ESCAPES:
                raise ValueError(
                    f"{self.key}: {match[0]} means nothing; there are {', '.join(_ESCAPES)}"
                )
            return _ESCAPES[match[0]]

        return re.sub(r"\\.?", character, line)

    def _check_number(self, value: Any) -> float | int:
        kinds = int | float if self.kind == "number" else int
        # Compared, not passed to isfinite, which overflows on huge integers.
        if not isinstance(value, kinds) or isinstance(value, bool) or not -_MAX <= value <= _MAX:
            raise self._no_number(value)
        least = -math.inf if self.minimum is None else self.minimum
        if value < least or (self.above and value == least):
            raise self._wrong(value, f"is too small; give {self._range()}")
        if self.maximum is not None and value > self.maximum:
            raise self._wrong(value, f"is too large; give {self._range()}")
        return float(value) if self.kind == "number" else value

    def _check_lines(self, value: Any) -> tuple[str, ...]:
        if not isinstance(value, list | tuple) or not all(isinstance(v, str) and v for v in value):
            raise self._wrong(value, "is no list of texts")
        return tuple(value)

    def _check_size(self, value: Any) -> None:
        if not isinstance(value, str):
            raise self._wrong(value, "is no text; write it like '12GiB'")
        try:
            parse_size(value)
        except ValueError as error:
            raise ValueError(f"{self.key}: {error}") from None

    def _offers(self, value: str) -> bool:
        return not self.choices or value in self.choices

    def _range(self) -> str:
        if self.minimum is None:
            return "a finite one"
        if self.maximum is None:
            return f"one {'above' if self.above else 'of at least'} {self.minimum}"
        if self.above:
            return f"one above {self.minimum} and at most {self.maximum}"
        return f"one from {self.minimum} to {self.maximum}"

    def _no_number(self, value: Any) -> ValueError:
        kind = "number" if self.kind == "number" else "whole number"
        return self._wrong(value, f"is no {kind}; give {self._range()}")

    def _wrong(self, value: Any, reason: str) -> ValueError:
        return ValueError(f"{self.key}: {_shown(value)} {reason}")


SETTINGS = (
    Setting(
        "temperature", "Temperature", "number", 0.6,
        "0 takes the likeliest token; the higher, the more varied.", "Sampling", minimum=0,
    ),
    Setting(
        "top_k", "Top-k", "integer", 40,
        "Sample from the k likeliest tokens; 0 for all.", "Sampling", minimum=0,
    ),
    Setting(
        "top_p", "Top-p", "number", 0.95,
        "Sample from this share of probability; 1 for all.", "Sampling",
        minimum=0, maximum=1, above=True,
    ),
    Setting(
        "min_p", "Min-p", "number", 0.05,
        "Drop tokens below this share of the likeliest one's probability; 0 for none.", "Sampling",
        minimum=0, maximum=1,
    ),
    Setting(
        "repetition_penalty", "Repetition penalty", "number", 1.0,
        "Above 1 discourages repetition; 1 is off.", "Sampling", minimum=0, above=True,
    ),
    Setting(
        "presence_penalty", "Presence penalty", "number", 0.0,
        "Subtracted for tokens seen already; 0 is off.", "Sampling",
    ),
    Setting(
        "frequency_penalty", "Frequency penalty", "number", 0.0,
        "Subtracted for each time a token was seen; 0 is off.", "Sampling",
    ),
    Setting(
        "penalty_window", "Penalty window", "integer", 64,
        "How many of the last tokens the penalties look at; -1 for all.", "Sampling", minimum=-1,
    ),
    Setting(
        "seed", "Seed", "integer", None,
        "Same seed, same text. Not set: another text each time.", "Sampling", minimum=0,
    ),
    Setting(
        "system", "System prompt", "text", None,
        "What the model is told before the conversation.", "Reply",
    ),
    Setting(
        "max_tokens", "Longest reply", "integer", None,
        "In tokens. Not set: as long as the context allows.", "Reply", minimum=1,
    ),
    Setting(
        "stop", "Stop texts", "lines", (),
        r"End the reply at any of these, one a line. \n is a new line, \s a space, \\ a backslash.",
        "Reply",
    ),
    Setting(
        "context", "Context", "integer", None,
        "In tokens. Not set: what the model was made for, at most 8192.", "Memory",
        minimum=1, needs_reload=True,
    ),
    Setting(
        "cache_type", "Cache type", "choice", "f16",
        "How the context is kept: q8_0 takes half the memory of f16, f32 twice as much.", "Memory",
        choices=("f16", "q8_0", "f32"), needs_reload=True,
    ),
    Setting(
        "ram", "Memory limit", "size", None,
        "Take no more memory than this, e.g. 12GiB; other experts stay on disk.", "Memory",
        needs_reload=True,
    ),
    Setting(
        "device", "Device", "choice", "auto",
        "Where to compute: auto is the GPU where there is one.", "Memory",
        choices=("auto", "cpu", "gpu"), needs_reload=True,
    ),
    Setting(
        "vram", "GPU memory limit", "size", None,
        "Take no more GPU memory than this, e.g. 8GiB; other experts stay in RAM or on disk.",
        "Memory", needs_reload=True,
    ),
    Setting(
        "cpu_moe", "Experts off the GPU", "switch", False,
        "Keep all routed experts off the GPU.", "Memory", needs_reload=True,
    ),
    Setting(
        "n_cpu_moe", "Layers off the GPU", "integer", None,
        "Keep the routed experts of the first so many layers off the GPU.", "Memory",
        minimum=0, needs_reload=True,
    ),
    Setting(
        "threads", "Threads", "integer", None,
        "Not set: one for each physical core.", "Memory",
        minimum=1, maximum=1024, needs_reload=True,
    ),
    Setting(
        "adapters", "Adapters", "lines", (),
        "Fine-tuned adapters, one a line: PATH or PATH:SCALE, PEFT's folders or GGUF files.",
        "Memory", needs_reload=True,
    ),
    Setting(
        "theme", "Theme", "choice", "localds-dark",
        "The colours of the app.", "Display", choices=theme_names(),
    ),
    Setting(
        "show_thinking", "Show thinking", "switch", False,
        "Unfold what the model thinks before it answers.", "Display",
    ),
    Setting(
        "show_panel", "Show side panel", "switch", True,
        "Show the panel beside the chat.", "Display",
    ),
)  # fmt: skip
BY_KEY: Mapping[str, Setting] = MappingProxyType({setting.key: setting for setting in SETTINGS})


class Layers:
    """Values from several mappings, each with a name, the most specific first; then the defaults.

    The mappings are read once. None in one of them is "not set". Keys that are unknown, and
    values that are invalid, are passed over and told by `problems`. `settings` are the ones to
    know of: `SETTINGS`, maybe with other `choices`.
    """

    def __init__(
        self,
        layers: Iterable[tuple[str, Mapping[str, Any]]],
        settings: Sequence[Setting] = SETTINGS,
    ) -> None:
        self._values = {setting.key: setting.default for setting in settings}
        self._sources: dict[str, str] = {}
        self._sampling = [s.key for s in settings if s.section == "Sampling"]
        self._problems: list[str] = []
        known = {setting.key: setting for setting in settings}
        for name, values in layers:
            for key, value in values.items():
                self._take(name, key, value, known.get(key))

    def value(self, key: str) -> Any:
        """The value that counts; None where it is left open. Raises `KeyError`."""
        return self._values[key]

    def source(self, key: str) -> str:
        """Name of the layer that the value comes from, or `DEFAULT`."""
        return self._sources.get(key, DEFAULT)

    def sampling(self) -> dict[str, Any]:
        """What `Session.generate` takes as sampling: fields of `SamplingParams`."""
        return {key: self._values[key] for key in self._sampling}

    def problems(self) -> list[str]:
        """What was passed over, and why; one sentence each."""
        return list(self._problems)

    def _take(self, name: str, key: str, value: Any, setting: Setting | None) -> None:
        if setting is None:
            self._problems.append(f"{name}: there is no setting {_shown(key)}; it is ignored")
        elif value is not None:
            try:
                checked = setting.check(value)
            except ValueError as error:
                self._problems.append(f"{name}: {error}; it is ignored")
                return
            if key not in self._sources:
                self._values[key], self._sources[key] = checked, name


def _format_lines(texts: Iterable[str]) -> str:
    return "\n".join(map(_escape, texts))


def _escape(text: str) -> str:
    """One line for `Setting.parse`; spaces at its ends, which are lost there, as escapes."""
    codes = {ord(character): code for code, character in _ESCAPES.items() if character != " "}
    body = text.strip(" ")
    before = len(text) - len(text.lstrip(" "))
    after = len(text) - len(body) - before
    return r"\s" * before + body.translate(codes) + r"\s" * after


def _shown(value: Any) -> str:
    shown = repr(value) if isinstance(value, str) else str(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."

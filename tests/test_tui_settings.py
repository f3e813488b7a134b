"""Settings of the app: against the command's options and the sampler's rules; texts; layers."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from inspect import signature
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.models import OptionInfo

from localds.commands.chat import chat
from localds.memory.latents import CACHE_TYPES
from localds.sampling import SamplingParams
from tui.settings import BY_KEY, DEFAULT, SETTINGS, Layers, Setting

SAMPLING = {field.name for field in fields(SamplingParams)} - {"logit_bias"}
NUMERIC = [setting for setting in SETTINGS if setting.kind in ("number", "integer")]


def chat_options() -> dict[str, tuple[Any, OptionInfo]]:
    """Default and declaration of each option of `localds chat`."""
    defaults = {name: p.default for name, p in signature(chat).parameters.items()}
    hints = get_type_hints(chat, include_extras=True)
    options = {}
    for name, hint in hints.items():
        for argument in get_args(hint)[1:]:
            if isinstance(argument, OptionInfo):
                options[name] = (defaults[name], argument)
    return options


OPTIONS = chat_options()
SHARED = sorted(OPTIONS.keys() & BY_KEY.keys())


MEMORY = {"context", "cache_type", "ram", "threads"}
GPU = {"device", "vram", "cpu_moe", "n_cpu_moe"}
RELOADED = MEMORY | GPU | {"adapters"}


def test_the_settings_are_those_of_the_command() -> None:
    shared = {*SAMPLING, *RELOADED, "stop", "max_tokens", "system"}
    assert set(SHARED) == shared - {"penalty_window"}
    assert set(BY_KEY) == shared | {"theme", "show_thinking", "show_panel"}
    assert len(BY_KEY) == len(SETTINGS)


@pytest.mark.parametrize("key", SHARED)
def test_defaults_and_limits_are_those_of_the_command(key: str) -> None:
    default, option = OPTIONS[key]
    setting = BY_KEY[key]
    assert setting.default == (() if setting.kind == "lines" else default)
    if option.min is not None or option.max is not None:
        assert (setting.minimum, setting.maximum) == (option.min, option.max)


def test_what_has_no_option_has_the_samplers_default() -> None:
    assert BY_KEY["penalty_window"].default == SamplingParams().penalty_window


def candidates(setting: Setting) -> list[float]:
    """Numbers at, just inside and just outside of the limits of any of the settings."""
    edges = [-1, 0, 1, 1024, math.inf, -math.inf, math.nan, 2**70, 10**400]
    if setting.kind == "integer":
        return [e + d for e in edges if isinstance(e, int) for d in (-1, 0, 1)] + [-1.0, 0.5, True]
    around = [math.nextafter(e, to) for e in (-1, 0, 1) for to in (-math.inf, math.inf)]
    return [*edges, *around, True]


@pytest.mark.parametrize("key", sorted(SAMPLING))
def test_exactly_what_the_sampler_takes_is_valid(key: str) -> None:
    for value in candidates(BY_KEY[key]):
        try:
            SamplingParams(**{key: value})  # type: ignore[arg-type]
        except ValueError:
            with pytest.raises(ValueError, match=f"^{key}: "):
                BY_KEY[key].check(value)
        else:
            assert BY_KEY[key].check(value) == value


def test_cache_types_and_sizes_are_those_of_the_runtime() -> None:
    assert set(BY_KEY["cache_type"].choices) == set(CACHE_TYPES)
    assert BY_KEY["ram"].parse(" 12GiB ") == "12GiB"
    with pytest.raises(ValueError, match="ram: size '12 bananas' is not understood; write it like"):
        BY_KEY["ram"].parse("12 bananas")


def test_a_change_of_what_is_fixed_at_loading_needs_a_reload() -> None:
    needing = {setting.key for setting in SETTINGS if setting.needs_reload}
    assert needing == RELOADED


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("temperature", "abc", "temperature: 'abc' is no number; give one of at least 0"),
        ("temperature", "-1", "temperature: -1.0 is too small; give one of at least 0"),
        ("temperature", "nan", "temperature: nan is no number; give one of at least 0"),
        ("top_p", "0", "top_p: 0.0 is too small; give one above 0 and at most 1"),
        ("top_p", "1.5", "top_p: 1.5 is too large; give one above 0 and at most 1"),
        ("min_p", "x", "min_p: 'x' is no number; give one from 0 to 1"),
        ("presence_penalty", "inf", "presence_penalty: inf is no number; give a finite one"),
        ("top_k", "1.5", "top_k: '1.5' is no whole number; give one of at least 0"),
        ("threads", "1025", "threads: 1025 is too large; give one from 1 to 1024"),
        ("show_panel", "maybe", "show_panel: 'maybe' is neither yes nor no"),
        ("cache_type", "q4", "cache_type: 'q4' is unknown; choose f16 or q8_0 or f32"),
        ("stop", r"a\q", r"stop: \q means nothing; there are \n, \r, \t, \s, \\"),
        ("stop", "a\\", r"stop: \ means nothing; there are \n, \r, \t, \s, \\"),
    ],
)
def test_what_is_wrong_is_told_with_a_remedy(key: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        BY_KEY[key].parse(text)
    assert str(error.value) == message


def test_a_long_text_is_not_repeated_in_full() -> None:
    with pytest.raises(ValueError, match="is no whole number") as error:
        BY_KEY["seed"].parse("9" * 10_000 + "x")
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.key)
def test_nothing_written_is_not_set(setting: Setting) -> None:
    assert setting.parse("") is None
    assert setting.parse(" \n") is None
    assert setting.format(None) == ""


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.key)
def test_defaults_are_valid_and_can_be_written(setting: Setting) -> None:
    if setting.default not in (None, ()):
        assert setting.check(setting.default) == setting.default
        assert setting.parse(setting.format(setting.default)) == setting.default


@given(st.sampled_from(NUMERIC), st.floats(allow_nan=False) | st.integers())
def test_every_valid_number_comes_back(setting: Setting, value: float) -> None:
    try:
        checked = setting.check(value)
    except ValueError:
        return
    again = setting.parse(setting.format(checked))
    assert again == checked
    assert type(again) is type(checked)


@given(st.lists(st.text(min_size=1), min_size=1))
def test_every_stop_text_comes_back(texts: list[str]) -> None:
    stop = BY_KEY["stop"]
    assert stop.parse(stop.format(texts)) == tuple(texts)


@given(st.lists(st.text(alphabet=" \\nst\t\r\n", min_size=1), min_size=1))
def test_stop_texts_of_blanks_and_backslashes_come_back(texts: list[str]) -> None:
    stop = BY_KEY["stop"]
    assert stop.parse(stop.format(texts)) == tuple(texts)


def test_stop_texts_are_lines_with_escapes() -> None:
    assert BY_KEY["stop"].parse("User:\n\n  END\t\n\\n\\n##\\s\na, b\n\\\\n") == (
        "User:",
        "END",
        "\n\n## ",
        "a, b",
        r"\n",
    )


def test_the_system_prompt_is_kept_as_written() -> None:
    text = "  You are\n\na poet.\n"
    assert BY_KEY["system"].parse(text) == text
    assert BY_KEY["system"].format(text) == text


def test_choices_can_be_given_by_the_app() -> None:
    assert BY_KEY["theme"].check("nord") == "nord"
    theme = replace(BY_KEY["theme"], choices=("textual-dark", "textual-light"))
    with pytest.raises(ValueError, match="choose textual-dark or textual-light"):
        theme.check("nord")
    assert Layers([("all models", {"theme": "nord"})], [theme]).source("theme") == DEFAULT


def test_the_most_specific_layer_counts() -> None:
    layers = Layers(
        [
            ("this chat", {"temperature": 1, "top_k": None}),
            ("this model", {"temperature": 0.2, "top_k": 7}),
            ("all models", {"stop": ["a", "b"], "show_panel": False}),
        ]
    )
    assert (layers.value("temperature"), layers.source("temperature")) == (1.0, "this chat")
    assert isinstance(layers.value("temperature"), float)
    assert (layers.value("top_k"), layers.source("top_k")) == (7, "this model")
    assert (layers.value("stop"), layers.source("stop")) == (("a", "b"), "all models")
    assert (layers.value("show_panel"), layers.source("show_panel")) == (False, "all models")
    assert (layers.value("top_p"), layers.source("top_p")) == (0.95, DEFAULT)
    assert layers.value("seed") is None
    assert layers.problems() == []
    with pytest.raises(KeyError):
        layers.value("colour")


def test_sampling_is_what_the_sampler_takes() -> None:
    layers = Layers(
        [("this chat", {"seed": 5, "max_tokens": 9}), ("the model's file", {"penalty_window": -1})]
    )
    sampling = layers.sampling()
    assert sampling.keys() == SAMPLING
    params = SamplingParams(**sampling)
    assert (params.seed, params.penalty_window, params.temperature) == (5, -1, 0.6)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", "0.5"),
        ("temperature", True),
        ("temperature", [1]),
        ("top_p", 0),
        ("top_k", 1.0),
        ("seed", -1),
        ("stop", "END"),
        ("stop", ["a", ""]),
        ("stop", ["a", 1]),
        ("ram", 12),
        ("ram", "much"),
        ("cache_type", "q4_0"),
        ("cache_type", ["f16"]),
        ("system", 5),
        ("show_panel", 1),
        ("threads", 0),
        ("theme", {}),
        ("colour", "red"),
    ],
)
def test_a_spoilt_layer_is_passed_over_and_told(key: str, value: Any) -> None:
    good = {"temperature": 0.1, "top_p": 0.2}
    layers = Layers([("this chat", {key: value}), ("this model", good)])
    (problem,) = layers.problems()
    assert problem.startswith("this chat: ")
    assert key in problem
    assert problem.endswith("; it is ignored")
    for name in BY_KEY:
        assert layers.source(name) == ("this model" if name in good else DEFAULT)
    assert (layers.value("temperature"), layers.value("top_p")) == (0.1, 0.2)


def test_the_mappings_are_read_once() -> None:
    values = {"temperature": 0.1}
    layers = Layers([("this chat", values)])
    values["temperature"] = 0.9
    assert layers.value("temperature") == 0.1

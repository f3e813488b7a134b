"""Conversations and texts as training examples: which tokens there are, and which count."""

# ruff: noqa: RUF001

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import vocabularies as v
from finetune_models import deepseek, encode, encoder, guide, mixtral, spelled, taught
from test_template import GLM, KIMI, MIXTRAL, V3

from localds.finetune.data.errors import RecordError
from localds.finetune.data.records import Text
from localds.prompt import encode_prompt
from localds.template import ChatTemplate, TemplateError
from localds.thinking import Reply

if TYPE_CHECKING:
    from pathlib import Path

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
TALK = [
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Good bye."},
]
REASONED = [
    TALK[0],
    {"role": "assistant", "reasoning_content": "One greets.", "content": "Hello!"},
    TALK[2],
    {"role": "assistant", "content": "<think>\nLeave.\n</think>\n\nGood bye."},
]


def chat(messages: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"messages": messages, **more}


def said(user: str, assistant: str) -> dict[str, Any]:
    return chat([{"role": "user", "content": user}, {"role": "assistant", "content": assistant}])


def test_the_guide_token_by_token() -> None:
    tokenizer, _ = guide()
    ids = tokenizer.token_id
    [example] = encode(encoder(tokenizer), chat([{"role": "system", "content": "Brief."}, *TALK]))
    wanted: list[tuple[int | None, bool]] = []
    for part, trained in [
        ([ids(BOS)], False),
        (tokenizer.encode("Brief.", bos=False), False),
        ([ids(USER)], False),
        (tokenizer.encode("Hi there", bos=False), False),
        ([ids(ASSISTANT)], False),
        (tokenizer.encode("Hello!", bos=False), True),
        ([ids(EOS)], True),
        ([ids(USER)], False),
        (tokenizer.encode("And now?", bos=False), False),
        ([ids(ASSISTANT)], False),
        (tokenizer.encode("Good bye.", bos=False), True),
        ([ids(EOS)], True),
    ]:
        wanted += [(token, trained) for token in part]
    assert list(zip(example.ids.tolist(), example.trained.tolist(), strict=True)) == wanted


@pytest.mark.parametrize(
    ("train_on", "wanted"),
    [
        ("assistant", [f"Hello!{EOS}", f"Good bye.{EOS}"]),
        ("last", [f"Good bye.{EOS}"]),
        (
            "all",
            [f"{USER}Hi there{ASSISTANT}Hello!{EOS}{USER}And now?{ASSISTANT}Good bye.{EOS}"],
        ),
    ],
)
def test_what_counts(train_on: str, wanted: list[str]) -> None:
    tokenizer, _ = guide()
    [example] = encode(encoder(tokenizer, train_on=train_on), chat(TALK))
    assert taught(tokenizer, example) == wanted


def test_all_counts_what_comes_after_the_last_reply() -> None:
    tokenizer, _ = guide()
    more = [*TALK, {"role": "user", "content": "Thanks"}]
    [example] = encode(encoder(tokenizer, train_on="all"), chat(more))
    assert taught(tokenizer, example)[0].endswith(f"Good bye.{EOS}{USER}Thanks")
    [example] = encode(encoder(tokenizer), chat(more))
    assert taught(tokenizer, example) == [f"Hello!{EOS}", f"Good bye.{EOS}"]
    [example] = encode(encoder(tokenizer, train_on="all"), chat(more[-1:]))
    assert taught(tokenizer, example) == [f"{USER}Thanks"]


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [((0, 1), [f"Good bye.{EOS}"]), ((1, 0), [f"Hello!{EOS}"]), ((1, None), None)],
)
def test_weights(weights: tuple[int | None, ...], wanted: list[str] | None) -> None:
    tokenizer, _ = guide()
    first, second = weights
    talk = [TALK[0], {**TALK[1], "weight": first}, TALK[2], {**TALK[3], "weight": second}]
    [example] = encode(encoder(tokenizer), chat(talk))
    assert taught(tokenizer, example) == (wanted or [f"Hello!{EOS}", f"Good bye.{EOS}"])


def test_nothing_that_counts_is_an_error() -> None:
    tokenizer, _ = guide()
    for talk in (TALK[:1], [TALK[0], {**TALK[1], "weight": 0}]):
        with pytest.raises(RecordError, match="nothing to learn"):
            encode(encoder(tokenizer), chat(talk))


@pytest.mark.parametrize("source", [None, V3])
def test_the_prompt_is_that_of_inference(source: str | None) -> None:
    tokenizer = deepseek() if source else guide()[0]
    used = encoder(tokenizer, source)
    chosen = ChatTemplate(source, BOS, EOS) if source else guide()[1]
    talk = [TALK[0], TALK[1], {"role": "user", "content": f"What is {USER}{EOS}?\n"}]
    prompt = encode_prompt(tokenizer, chosen, talk, {}).ids
    [example] = encode(used, chat([*talk, TALK[3]]))
    assert example.ids[: len(prompt)].tolist() == prompt
    assert not example.trained[len(prompt) - 3 : len(prompt)].any()
    assert example.trained[len(prompt) :].all()


def test_special_tokens_in_messages_stay_text() -> None:
    tokenizer, _ = guide()
    eos, user = tokenizer.token_id(EOS), tokenizer.token_id(USER)
    [example] = encode(encoder(tokenizer), said(f"Say {EOS}", f"I say {EOS}{USER} so."))
    assert taught(tokenizer, example) == [f"I say {EOS}{USER} so.{EOS}"]
    assert example.ids.tolist().count(eos) == 1
    assert example.ids.tolist().count(user) == 1


# Templates that leave out what was thought


def test_reasoning_splits_a_conversation_into_its_turns() -> None:
    tokenizer = deepseek()
    first, second = encode(encoder(tokenizer, V3), chat(REASONED))
    assert spelled(tokenizer, first) == [
        (False, f"{BOS}{USER}Hi there{ASSISTANT}"),
        (True, f"<think>\nOne greets.\n</think>\n\nHello!{EOS}"),
    ]
    assert spelled(tokenizer, second) == [
        (False, f"{BOS}{USER}Hi there{ASSISTANT}Hello!{EOS}{USER}And now?{ASSISTANT}"),
        (True, f"<think>\nLeave.\n</think>\n\nGood bye.{EOS}"),
    ]
    # The tags are DeepSeek's own tokens.
    assert tokenizer.token_id("<think>") in first.ids
    assert tokenizer.token_id("</think>") in first.ids


def test_a_prompt_that_opens_the_thinking_part() -> None:
    tokenizer = deepseek()
    used = encoder(tokenizer, V3, template_options={"thinking": True})
    first, second = encode(used, chat([*REASONED[:3], TALK[3]]))
    assert spelled(tokenizer, first) == [
        (False, f"{BOS}{USER}Hi there{ASSISTANT}<think>\n"),
        (True, f"One greets.\n</think>\n\nHello!{EOS}"),
    ]
    assert taught(tokenizer, second) == [f"</think>\n\nGood bye.{EOS}"]
    # As `Session.generate` goes on with a reply.
    prompt = encode_prompt(tokenizer, ChatTemplate(V3, BOS, EOS), TALK[:1], {"thinking": True})
    begun = Reply("One greets.\n", "Hello!").written(opened=prompt.opens_thinking)
    ids = [*prompt.ids, *tokenizer.encode(begun, special=True, bos=False)]
    assert first.ids.tolist() == [*ids, tokenizer.token_id(EOS)]


V31 = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'user' %}<｜User｜>{{ m.content }}
{%- elif m.role == 'assistant' %}<｜Assistant｜></think>{{ m.content + eos_token }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>
{%- if thinking is defined and thinking %}<think>{% else %}</think>{% endif %}
{%- endif %}"""


def test_a_template_that_closes_the_thinking_part_unless_told() -> None:
    tokenizer = deepseek()
    used = encoder(tokenizer, V31)
    [plain] = encode(used, chat(TALK))
    assert taught(tokenizer, plain) == [f"Hello!{EOS}", f"Good bye.{EOS}"]
    first, second = encode(used, chat(REASONED))
    assert spelled(tokenizer, first) == [
        (False, f"{BOS}{USER}Hi there{ASSISTANT}<think>"),
        (True, f"One greets.</think>Hello!{EOS}"),
    ]
    assert spelled(tokenizer, second)[0][1].endswith(
        f"{ASSISTANT}</think>Hello!{EOS}{USER}And now?{ASSISTANT}<think>"
    )


def test_a_template_that_keeps_reasoning_only_when_told() -> None:
    source = V31.replace(
        "<｜Assistant｜></think>{{ m",
        "<｜Assistant｜>{% if thinking %}<think>{{ m.reasoning_content }}{% endif %}</think>{{ m",
    )
    [example] = encode(encoder(deepseek(), source), chat(REASONED))
    assert taught(deepseek(), example) == [
        f"One greets.</think>Hello!{EOS}",
        f"Leave.</think>Good bye.{EOS}",
    ]


def test_a_template_without_a_place_for_reasoning() -> None:
    source = V31.replace("thinking is defined and thinking", "false")
    with pytest.raises(RecordError, match="no place for reasoning"):
        encode(encoder(deepseek(), source), chat(REASONED))


KEEPS = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'user' %}<｜User｜>{{ m.content }}
{%- else %}<｜Assistant｜><think>{{ m.reasoning_content }}</think>{{ m.content + eos_token }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""


def test_a_template_that_keeps_the_reasoning() -> None:
    tokenizer = deepseek()
    source = KEEPS.replace("<think>\\n", "<think>")
    [example] = encode(encoder(tokenizer, source), chat(REASONED))
    assert taught(tokenizer, example) == [
        f"One greets.</think>Hello!{EOS}",
        f"Leave.</think>Good bye.{EOS}",
    ]
    # Here the prompt ends in a line end that the template does not write afterwards.
    both = encode(encoder(tokenizer, KEEPS), chat(REASONED))
    assert [taught(tokenizer, example) for example in both] == [
        [f"One greets.</think>Hello!{EOS}"],
        [f"Leave.</think>Good bye.{EOS}"],
    ]


EMPTY_IN_PROMPT = V31.replace("<｜Assistant｜></think>{{ m", "<｜Assistant｜>HISTORY{{ m").replace(
    "{% else %}</think>", "{% else %}<think>\n</think>"
)


@pytest.mark.parametrize("history", ["</think>", "<think>\n\n</think>", ""])
def test_a_prompt_with_an_empty_thinking_part(history: str) -> None:
    tokenizer = deepseek()
    used = encoder(tokenizer, EMPTY_IN_PROMPT.replace("HISTORY", history))
    first, second = encode(used, chat(TALK))
    assert spelled(tokenizer, first) == [
        (False, f"{BOS}{USER}Hi there{ASSISTANT}<think>\n</think>"),
        (True, f"Hello!{EOS}"),
    ]
    assert taught(tokenizer, second) == [f"Good bye.{EOS}"]
    reasoned = encode(used, chat(REASONED))
    assert spelled(tokenizer, reasoned[0])[0] == (
        False,
        f"{BOS}{USER}Hi there{ASSISTANT}<think>",
    )
    assert taught(tokenizer, reasoned[0])[0].startswith("One greets.")
    assert taught(tokenizer, reasoned[0])[0].endswith(
        f"</think>{'' if history else chr(10) * 2}Hello!{EOS}"
    )


@pytest.mark.parametrize(("empty", "line_end"), [("", ""), ("\n\n", "\n")])
def test_a_template_that_empties_the_thinking_part(empty: str, line_end: str) -> None:
    tokenizer = deepseek()
    source = V31.split("{% if add")[0].replace("</think>", f"<think>{empty}</think>")
    source += "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
    [plain] = encode(encoder(tokenizer, source), chat(TALK))
    assert taught(tokenizer, plain)[0] == f"<think>{empty}</think>Hello!{EOS}"
    first, _ = encode(encoder(tokenizer, source), chat(REASONED))
    assert taught(tokenizer, first) == [
        f"<think>{line_end}One greets.{line_end}</think>Hello!{EOS}"
    ]


def test_all_counts_nothing_twice_in_split_conversations() -> None:
    tokenizer = deepseek()
    first, second = encode(encoder(tokenizer, V3, train_on="all"), chat(REASONED))
    assert taught(tokenizer, first) == [
        f"{USER}Hi there{ASSISTANT}<think>\nOne greets.\n</think>\n\nHello!{EOS}"
    ]
    assert taught(tokenizer, second) == [
        f"{USER}And now?{ASSISTANT}<think>\nLeave.\n</think>\n\nGood bye.{EOS}"
    ]


def test_of_split_turns_those_without_weight_are_left_out() -> None:
    talk = [REASONED[0], {**REASONED[1], "weight": 0}, *REASONED[2:]]
    [example] = encode(encoder(deepseek(), V3), chat(talk))
    assert taught(deepseek(), example) == [f"<think>\nLeave.\n</think>\n\nGood bye.{EOS}"]


# Other families


def test_mixtral_token_by_token() -> None:
    tokenizer = mixtral()
    [example] = encode(encoder(tokenizer, MIXTRAL), chat(TALK))
    ids = tokenizer.encode
    assert example.ids.tolist() == [
        *ids("[INST] Hi there [/INST]"),
        *ids("Hello!", bos=False),
        2,
        *ids("[INST] And now? [/INST]", bos=False),
        *ids("Good bye.", bos=False),
        2,
    ]
    assert taught(tokenizer, example) == [" Hello!</s>", " Good bye.</s>"]


def test_mixtral_with_a_space_before_the_reply() -> None:
    tokenizer = mixtral()
    source = MIXTRAL.replace("{{- message['content'] + eos", "{{- ' ' + message['content'] + eos")
    [spaced] = encode(encoder(tokenizer, source), said("Hi", "Hello!"))
    [example] = encode(encoder(tokenizer, MIXTRAL), said("Hi", "Hello!"))
    assert spaced.ids.tolist() == example.ids.tolist()


def test_mixtral_refuses_in_its_own_words() -> None:
    with pytest.raises(TemplateError, match="must alternate"):
        encode(encoder(mixtral(), MIXTRAL), chat([TALK[1], *TALK]))


LETTERS = [v.byte_level(bytes([i])) for i in range(256)]


def test_a_turn_that_ends_where_the_next_begins(tmp_path: Path) -> None:
    names = ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>"]
    metadata = v.bpe_metadata(
        [*LETTERS, *names],
        [],
        [v.NORMAL] * 256 + [v.CONTROL] * 6,
        eos_token_id=261,
    )
    tokenizer = v.tokenizer_of(tmp_path, metadata)
    [example] = encode(encoder(tokenizer, GLM), chat(TALK))
    assert spelled(tokenizer, example) == [
        (False, "[gMASK]<sop><|user|>\nHi there<|assistant|>"),
        (True, "\nHello!<|user|>"),
        (False, "\nAnd now?<|assistant|>"),
        (True, "\nGood bye.<|user|>"),
    ]


def test_kimi_ends_with_its_own_token(tmp_path: Path) -> None:
    names = ["<|im_system|>", "<|im_middle|>", "<|im_end|>", "<|im_user|>", "<|im_assistant|>"]
    metadata = v.bpe_metadata(
        [*LETTERS, *names, "[EOS]"],
        [],
        [v.NORMAL] * 256 + [v.CONTROL] * 6,
        eos_token_id=261,
    )
    tokenizer = v.tokenizer_of(tmp_path, metadata)
    [example] = encode(encoder(tokenizer, KIMI), chat(TALK))
    assert taught(tokenizer, example) == ["Hello!<|im_end|>", "Good bye.<|im_end|>"]


def test_what_follows_the_end_token_is_not_learned() -> None:
    tokenizer = deepseek()
    source = V31.replace("eos_token }}", "eos_token + '\\n' }}").replace("</think>", "")
    [example] = encode(encoder(tokenizer, source), chat(TALK))
    assert spelled(tokenizer, example) == [
        (False, f"{BOS}{USER}Hi there{ASSISTANT}"),
        (True, f"Hello!{EOS}"),
        (False, f"\n{USER}And now?{ASSISTANT}"),
        (True, f"Good bye.{EOS}"),
    ]


def test_templates_that_ask_otherwise_than_they_write() -> None:
    source = "{{ bos_token }}{% if add_generation_prompt %}ask{% endif %}{{ messages | length }}"
    with pytest.raises(RecordError, match="otherwise than it asks"):
        encode(encoder(deepseek(), source), said("a", "b"))


# Tools

TOOLS = """{{ bos_token }}{% for t in tools or [] %}{{ t | tojson }}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}<｜Assistant｜>{{ m.content or '' }}
{%- for c in m.tool_calls or [] %}[{{ c.function.name }} {{ ARGUMENTS }}]{% endfor %}{{ eos_token }}
{%- else %}<｜User｜>{{ m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<｜Assistant｜>{% endif %}"""
CALL = {"function": {"name": "weather", "arguments": '{"city": "Köln"}'}, "id": "1"}
CALLING = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "Rain"},
    {"role": "assistant", "content": "It rains."},
]


@pytest.mark.parametrize("arguments", ["c.function.arguments", "c.function.arguments | tojson"])
@pytest.mark.parametrize("given", ['{"city": "Köln"}', {"city": "Köln"}])
def test_tool_calls(arguments: str, given: object) -> None:
    call = {"function": {"name": "weather", "arguments": given}}
    talk = [CALLING[0], {**CALLING[1], "tool_calls": [call]}, *CALLING[2:]]
    source = TOOLS.replace("ARGUMENTS", arguments)
    record = chat(talk, tools=[{"name": "weather", "note": EOS}])
    [example] = encode(encoder(deepseek(), source), record)
    assert taught(deepseek(), example) == [
        f'[weather {{"city": "Köln"}}]{EOS}',
        f"It rains.{EOS}",
    ]
    assert spelled(deepseek(), example)[0][1].startswith(
        f'{BOS}{{"name": "weather", "note": "{EOS}'
    )
    assert example.ids.tolist().count(1) == 2  # the tools spell the end token as text


def test_templates_that_spell_a_missing_text_as_none() -> None:
    source = TOOLS.replace("ARGUMENTS", "c.function.arguments").replace(
        "m.content or ''", "m.content"
    )
    [example] = encode(encoder(deepseek(), source), chat(CALLING))
    assert taught(deepseek(), example)[0] == f'[weather {{"city": "Köln"}}]{EOS}'


def test_templates_that_want_no_text_beside_calls() -> None:
    source = TOOLS.replace("ARGUMENTS", "c.function.arguments").replace(
        "m.tool_calls or []", "((m.tool_calls or []) if m.content is none else [])"
    )
    [example] = encode(encoder(deepseek(), source), chat(CALLING))
    assert taught(deepseek(), example)[0] == f'[weather {{"city": "Köln"}}]{EOS}'
    both = [CALLING[0], {**CALLING[1], "content": "Let me see."}, *CALLING[2:]]
    with pytest.raises(RecordError, match="leaves out what is called"):
        encode(encoder(deepseek(), source), chat(both))


def test_templates_that_fail_with_calls() -> None:
    with pytest.raises(TemplateError, match="access to attribute 'append'"):
        source = TOOLS.replace("ARGUMENTS", "[].append(1)")
        encode(encoder(deepseek(), source), chat(CALLING))


def test_templates_that_leave_things_out_are_refused() -> None:
    used = encoder(guide()[0])
    with pytest.raises(RecordError, match="writes no tool calls"):
        encode(used, chat(CALLING))
    with pytest.raises(RecordError, match="leaves out messages of role 'tool'"):
        encode(used, chat([CALLING[0], CALLING[2], CALLING[3]]))
    with pytest.raises(RecordError, match="arguments are not JSON"):
        broken = {"function": {"name": "f", "arguments": "{"}}
        source = TOOLS.replace("ARGUMENTS", "c.function.arguments")
        talk = [CALLING[0], {"role": "assistant", "tool_calls": [broken]}]
        encode(encoder(deepseek(), source), chat(talk))


# Texts


def test_a_completion() -> None:
    for tokenizer in (guide()[0], mixtral()):
        [example] = encode(encoder(tokenizer), {"prompt": "2+2=", "completion": "4</s>"})
        prompt = tokenizer.encode("2+2=")
        assert example.ids[: len(prompt)].tolist() == prompt
        assert not example.trained[: len(prompt)].any()
        assert example.trained[len(prompt) :].all()
        end = tokenizer.token_id(tokenizer.eos_text)
        assert example.ids.tolist().index(end) == len(example) - 1
        assert tokenizer.decode(example.ids) == "2+2=4</s>"


def test_prompts_that_are_messages() -> None:
    tokenizer, _ = guide()
    record = {"prompt": TALK[:3], "completion": TALK[3:]}
    [example] = encode(encoder(tokenizer), record)
    assert taught(tokenizer, example) == [f"Good bye.{EOS}"]


def test_a_text() -> None:
    for tokenizer in (guide()[0], mixtral()):
        [example] = encode(encoder(tokenizer), {"text": f"A text.{EOS}"})
        end = tokenizer.token_id(tokenizer.eos_text)
        assert example.ids.tolist() == [*tokenizer.encode(f"A text.{EOS}"), end]
        assert example.trained.tolist() == [False] + [True] * (len(example) - 1)


@pytest.mark.parametrize("name", ["guide", "mixtral", "without bos"])
def test_a_long_text_in_pieces(name: str, tmp_path: Path) -> None:
    plain = v.bpe_metadata(
        [*LETTERS, "<end>"], [], [v.NORMAL] * 256 + [v.CONTROL], eos_token_id=256
    )
    tokenizer = {
        "guide": lambda: guide()[0],
        "mixtral": mixtral,
        "without bos": lambda: v.tokenizer_of(tmp_path, plain),
    }[name]()
    text = "\n".join(f"Line {i} of a text, é." for i in range(9000))
    pieces = encoder(tokenizer, length=500).encode(Text(text, cut=True))
    whole = [*tokenizer.encode(text, bos=False), tokenizer.token_id(tokenizer.eos_text)]
    bos = [tokenizer.bos_id] if tokenizer.add_bos else []
    learned = [i for piece in pieces for i in piece.ids[piece.trained].tolist()]
    # Every token is predicted once, but for a first one that nothing precedes.
    assert learned == (whole if bos else whole[1:])
    assert all(len(piece) == 501 for piece in pieces[:-1])
    assert all(piece.ids[:1].tolist() == bos for piece in pieces if bos)


def test_what_fits() -> None:
    tokenizer, _ = guide()
    used = encoder(tokenizer, length=8)
    [long] = encode(used, said("Hi", "one two three four five six seven eight nine ten"))
    fitting = used.fit(long)
    assert fitting is not None
    assert fitting.ids.tolist() == long.ids[:9].tolist()
    assert fitting.trained.tolist() == long.trained[:9].tolist()
    [late] = encode(used, said("one two three four five six seven eight nine ten", "Hi"))
    assert used.fit(late) is None
    [short] = encode(used, {"text": "a"})
    assert used.fit(short) is short


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="length is 4"):
        encoder(guide()[0], length=4)
    with pytest.raises(ValueError, match="train_on is 'user'"):
        encoder(guide()[0], train_on="user")

"""A run that needs nothing: the built-in model learns to reply with JSON where it is told to.

The data are 173 questions with the system prompt "Reply with JSON." and the command that answers
each, and 92 dialogues of the model's own, so that it keeps its answers. 40 questions that are not
among them show what it has learnt.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import localds
from localds.catalog.resolve import DEMO
from localds.finetune.config import ATTENTION, FEED_FORWARD, AdapterConfig
from localds.finetune.loop import TrainSettings
from localds.finetune.options import Options
from localds.finetune.run import Job, prepare

if TYPE_CHECKING:
    from collections.abc import Callable

TRAIN = Path(__file__).parent / "train.jsonl"
HELD_OUT = Path(__file__).parent / "held_out.jsonl"

# Not kv_b_proj, which a GGUF adapter could not hold.
_TARGETS = (*(target for target in ATTENTION if target != "kv_b_proj"), *FEED_FORWARD)

OPTIONS = Options(
    adapter=AdapterConfig(rank=8, alpha=16, targets=_TARGETS),
    training=TrainSettings(steps=160, learning_rate=3e-3, warmup=0.05),
    batch=2,
    lengths=(128,),
    evaluation_share=0.0,
    device="cpu",
)
"""High rates and few steps: the model is tiny, and so are the data."""

_LONGEST = 60  # tokens of a reply


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out question, and the reply that is right."""

    system: str
    text: str
    reply: str


def questions() -> list[Question]:
    """The held-out questions."""
    lines = HELD_OUT.read_text(encoding="utf-8").splitlines()
    return [
        Question(*(message["content"] for message in json.loads(line)["messages"]))
        for line in lines
    ]


def ask(adapter: Path | None, on_reply: Callable[[], None] = lambda: None) -> list[str]:
    """What the built-in model replies to the held-out questions, with an adapter or without."""
    adapters = [] if adapter is None else [(adapter, 1.0)]
    replies = []
    with localds.load(DEMO, "cpu", adapters=adapters) as model:
        session = model.session()
        for question in questions():
            session.truncate(0)
            messages = [
                {"role": "system", "content": question.system},
                {"role": "user", "content": question.text},
            ]
            pieces = session.generate(messages, max_tokens=_LONGEST, temperature=0.0)
            replies.append("".join(map(str, pieces)))
            on_reply()
    return replies


def share_right(replies: list[str]) -> float:
    """The share of replies that are exactly right, from 0 to 1."""
    asked = questions()
    pairs = zip(replies, asked, strict=True)
    return sum(reply == question.reply for reply, question in pairs) / len(asked)


def prepare_example(output: Path, *, resume: bool = False) -> Job:
    """The run, ready to train into the folder `output`; see `prepare`."""
    return prepare(DEMO, [TRAIN], output, OPTIONS, resume=resume)

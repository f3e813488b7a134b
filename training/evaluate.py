"""Ask the guide, with python -m training.evaluate, what was written apart from its training.

The questions are evaluation/questions.toml. The model runs in localds itself, as a user meets it:
sampled as `localds chat` samples it, and beside that, as chat samples a model that recommends
nothing. With --write, every reply goes to docs/demo-model/replies.md and the experts' shares to
docs/demo-model/routing.svg. Exits with status 1 where fewer replies are right than must be, or an
expert gets too few tokens.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import re
import sys
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import localds
from localds import models
from localds.catalog.resolve import DEMO
from localds.commands.chat import chat
from localds.memory.latents import LatentCache
from localds.ops.cpu import CpuOps
from localds.ops.recording import Recording
from localds.recommended import recommended_sampling
from training.topics import QUESTIONS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from localds.model import Model

ROOT = Path(__file__).parent.parent
REPORTS = ROOT / "docs" / "demo-model"
MUST_BE_RIGHT = 0.85
LEAST_SHARE = 0.25
_LONGEST = 120  # tokens of a reply


@dataclass(frozen=True, slots=True)
class Question:
    """One question; a right reply matches every regular expression in `expect`."""

    text: str
    intent: str
    form: str
    expect: tuple[str, ...]

    def accepts(self, reply: str) -> bool:
        """Whether `reply` names what it must."""
        return all(re.search(pattern, reply, re.IGNORECASE) for pattern in self.expect)


@dataclass(frozen=True, slots=True)
class Answer:
    """A question and what the guide said to it; `tokens` are those of both."""

    question: Question
    reply: str
    tokens: tuple[int, ...]

    @property
    def right(self) -> bool:
        """Whether the reply names what it must."""
        return self.question.accepts(self.reply)


def load_questions() -> list[Question]:
    """The held-out questions."""
    entries = tomllib.loads(QUESTIONS.read_text(encoding="utf-8"))["question"]
    return [
        Question(entry["text"], entry["intent"], entry["form"], tuple(entry["expect"]))
        for entry in entries
    ]


def chat_sampling() -> dict[str, Any]:
    """The sampling of `localds chat` where a model recommends nothing."""
    defaults = {name: p.default for name, p in inspect.signature(chat).parameters.items()}
    return {name: defaults[name] for name in ("temperature", "top_k", "top_p", "min_p")}


def ask(model: Model, questions: Iterable[Question], **sampling: Any) -> Iterator[Answer]:
    """Put every question to the model, each in a conversation of its own."""
    session = model.session()
    for question in questions:
        session.truncate(0)
        messages = [{"role": "user", "content": question.text}]
        reply = "".join(
            map(str, session.generate(messages, max_tokens=_LONGEST, seed=1, **sampling))
        )
        yield Answer(question, reply, session.tokens)


def routing(model: Model, answers: Iterable[Answer]) -> dict[int, NDArray[np.float64]]:
    """By layer, the tokens that each expert gets over the answers, in fair shares."""
    recording = Recording()
    decoder = models.build(model.gguf, CpuOps(recording))
    geometry = model.geometry
    for answer in answers:
        cache = LatentCache(geometry.layers, geometry.cache_width, len(answer.tokens))
        decoder.states(np.array(answer.tokens, np.int32), cache)
    shares = {}
    for name, sums in sorted(recording.sums().items()):
        if name.endswith(".ffn_down_exps.weight"):
            shares[int(name.split(".")[1])] = sums.counts / sums.counts.mean()
    return shares


def share_right(answers: Iterable[Answer]) -> float:
    """The share of right answers."""
    return float(np.mean([answer.right for answer in answers]))


def main() -> None:
    """Evaluate, report, and judge."""
    parser = argparse.ArgumentParser(prog="python -m training.evaluate")
    parser.add_argument("model", nargs="?", type=Path, default=DEMO)
    parser.add_argument("--write", action="store_true", help="write the reports in docs/")
    options = parser.parse_args()
    questions = load_questions()
    with localds.load(options.model) as model:
        recommended = chat_sampling() | recommended_sampling(model.gguf)
        answers = list(ask(model, questions, **recommended))
        warm = list(ask(model, questions, **chat_sampling()))
        shares = routing(model, answers)
    print(_table(answers, warm))
    for layer, share in shares.items():
        print(f"layer {layer}: experts get {share.min():.2f} to {share.max():.2f} of a fair share")
    if options.write:
        REPORTS.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(options.model.read_bytes()).hexdigest()
        (REPORTS / "replies.md").write_text(_replies(answers, digest), encoding="utf-8")
        from training.plots import draw_routing

        draw_routing(shares, REPORTS / "routing.svg")
    else:
        for answer in answers:
            if not answer.right:
                print(f"- {answer.question.intent}: {answer.question.text!r} -> {answer.reply!r}")
    least = min(share.min() for share in shares.values())
    if share_right(answers) < MUST_BE_RIGHT or least < LEAST_SHARE:
        sys.exit(1)


def _table(answers: list[Answer], warm: list[Answer]) -> str:
    """Right answers by the form of the question, as a Markdown table."""
    lines = ["| questions | number | right | right at temperature 0.6 |", "|---|---|---|---|"]
    forms = Counter(answer.question.form for answer in answers)
    for form in (*forms, None):
        rows = [[a for a in group if form in (a.question.form, None)] for group in (answers, warm)]
        shares = " | ".join(f"{100 * share_right(answers):.1f}%" for answers in rows)
        lines.append(f"| {form or 'all'} | {len(rows[0])} | {shares} |")
    return "\n".join(lines)


def _replies(answers: list[Answer], digest: str) -> str:
    lines = [
        "# What the guide replies",
        "",
        "Written by `python -m training.evaluate --write`: every held-out question with the",
        "reply, and x where it does not name what it must. The model file's SHA-256 is",
        f"`{digest}`.",
        "",
        "| | question | reply |",
        "|---|---|---|",
    ]
    for answer in answers:
        cells = (" " if answer.right else "x", answer.question.text, answer.reply)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

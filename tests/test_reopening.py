"""Conversations opened again: what is computed after restoring rows is what it was before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

import localds
from localds.memory.kept_rows import KeptRows
from localds.memory.row_blocks import BLOCK
from localds.prompt import common_prefix, encode_prompt

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from localds.model import Model
    from localds.session import Session

TEXT = "How do I download a model, and how much memory does it take? " * 20
CHAT = [
    {"role": "system", "content": "You are the guide. " * 20},
    {"role": "user", "content": "How do I download a model?"},
]


class Stop(Exception):  # noqa: N818  not an error
    pass


@pytest.fixture(scope="module")
def guide(guide_path: Path) -> Iterator[Model]:
    with localds.load(guide_path) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Iterator[Model]:
    with localds.load(tiny_model) as loaded:
        yield loaded


@pytest.fixture
def kept(guide: Model, tmp_path: Path) -> KeptRows:
    return KeptRows(tmp_path, guide.fingerprint)


def reply(session: Session, prompt: object, **options: object) -> str:
    pieces = session.generate(prompt, temperature=0.0, **options)  # type: ignore[arg-type]
    return "".join(map(str, pieces))


@pytest.mark.parametrize(
    ("name", "cache_type"),
    [("guide", "f16"), ("guide", "f32"), ("tiny", "f16"), ("tiny", "f32"), ("tiny", "q8_0")],
)
def test_rows_and_the_next_logits_are_the_same(
    name: str, cache_type: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model: Model = request.getfixturevalue(name)
    kept = KeptRows(tmp_path, model.fingerprint)
    ids = model.tokenizer.encode(TEXT)
    session = model.session(cache_type=cache_type)
    session.prefill(TEXT)
    assert session.keep(kept) > 0
    again = model.session(cache_type=cache_type)
    restored = again.restore(TEXT, kept)
    assert restored == len(ids) > 3 * BLOCK
    assert again.tokens == tuple(ids[:restored])
    assert again._cache.rows(0, restored) == session._cache.rows(0, restored)
    following = ids[:20]
    logits = [s.evaluate(following, all_logits=True) for s in (session, again)]
    np.testing.assert_array_equal(*logits)
    other = model.session(cache_type="f32" if cache_type == "f16" else "f16")
    assert other.restore(TEXT, kept) == 0
    assert other.tokens == ()


def test_a_conversation_goes_on_where_it_was(guide: Model, kept: KeptRows) -> None:
    session = guide.session(cache_type="f32")
    answer = reply(session, CHAT, max_tokens=60)
    session.keep(kept)
    chat = [*CHAT, {"role": "assistant", "content": answer}]
    chat.append({"role": "user", "content": "And where does it go?"})
    ids = encode_prompt(guide.tokenizer, guide.template, chat, {}).ids
    common = common_prefix(session.tokens, ids)
    assert common == len(session.tokens)
    again = guide.session(cache_type="f32")
    assert again.restore(chat, kept) == common >= 2 * BLOCK
    text = reply(again, chat, max_tokens=40)
    assert again.stats.reused_tokens == common
    assert text == reply(session, chat, max_tokens=40)
    assert text == reply(guide.session(cache_type="f32"), chat, max_tokens=40)


def test_template_options_lead_to_other_tokens(guide: Model, kept: KeptRows) -> None:
    options = {"add_generation_prompt": False}
    ids = encode_prompt(guide.tokenizer, guide.template, CHAT, options).ids
    session = guide.session()
    session.prefill(CHAT, options)
    assert session.tokens == tuple(ids)
    session.keep(kept)
    again = guide.session()
    assert again.restore(CHAT, kept, options) == len(ids)


def test_restoring_keeps_what_a_session_has(guide: Model, kept: KeptRows) -> None:
    ids = guide.tokenizer.encode(TEXT)
    session = guide.session()
    session.prefill(TEXT)
    session.keep(kept)
    other = guide.session()
    other.evaluate([*ids[:70], 1, 2, 3])
    assert other.restore(TEXT, kept) == len(ids) - 70
    assert other.tokens == tuple(ids)
    assert other.restore(TEXT, kept) == 0
    assert other.restore("Something else.", kept) == 0
    assert len(other.tokens) < BLOCK


def test_an_interrupted_restore_leaves_whole_blocks(
    guide: Model, kept: KeptRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = guide.session()
    session.prefill(TEXT)
    session.keep(kept)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    again = guide.session()
    monkeypatch.setattr("localds.memory.row_blocks.RowBlock.touch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        again.restore(TEXT, kept)
    assert again.tokens == session.tokens[:BLOCK]
    assert again._cache.length == BLOCK


def test_an_interrupted_prefill_goes_on_later(guide: Model) -> None:
    ids = guide.tokenizer.encode(TEXT)
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if seen[-1] == (100, len(ids)):
            raise Stop

    session = guide.session(cache_type="f32", chunk=50)
    with pytest.raises(Stop):
        session.prefill(TEXT, on_progress=stop)
    assert session.tokens == tuple(ids[:100])
    session.prefill(TEXT, on_progress=stop)
    assert seen[-1] == (len(ids) - 100, len(ids) - 100)
    assert session.tokens == tuple(ids)
    assert session.stats.reused_tokens == 100
    assert session.stats.generated_tokens == 0
    whole_text = reply(session, TEXT, max_tokens=20)
    assert session.stats.reused_tokens == len(ids) - 1
    assert whole_text == reply(guide.session(cache_type="f32"), TEXT, max_tokens=20)


def test_where_a_model_keeps_rows(guide: Model, own_cache: Path) -> None:
    session = guide.session()
    session.prefill(TEXT)
    written = session.keep(guide.kept_rows())
    assert written > 0
    folder = own_cache / "localds" / "latents" / guide.fingerprint[:16]
    assert sum(path.stat().st_size for path in folder.iterdir()) == written
    assert guide.kept_rows(cap_bytes=0).trim() == written


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path

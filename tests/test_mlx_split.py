"""Models of which some experts lie on the device, the others with the host, on MLX's CPU device."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from test_golden import assert_close, convert_variant, golden

from localds import models
from localds.gguf import GGUFFile
from localds.memory.experts import ExpertStore
from localds.memory.placement import place
from localds.memory.plan import make_plan
from localds.ops.cpu import CpuOps

mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'mlx[cpu]'")

from localds.ops.mlx import MlxDecoder, build_decoder  # noqa: E402
from localds.ops.mlx.backend import PORTABLE  # noqa: E402
from localds.ops.mlx.split import SplitMoe  # noqa: E402
from localds.ops.mlx.splitting import Split  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

VARIANTS = ("v2-lite", "v3", "mixtral")


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def path(variant: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_variant(variant, tmp_path_factory.mktemp("split"))


class Builder:
    """Builds split models of a file; `stored` ones read their experts from a pool of few slots."""

    def __init__(self, path: Path) -> None:
        self.gguf = GGUFFile.open(path)
        self.geometry = models.read_geometry(self.gguf)

    def __call__(
        self,
        slots: int | Sequence[int],
        *,
        stream_from: int | None = None,
        adopt: bool = False,
        stored: bool = False,
        piece: int = 2,
        usage: NDArray[np.uint32] | None = None,
    ) -> MlxDecoder:
        geometry = self.geometry
        store = self._store() if stored else None
        layers = [slots] * geometry.moe_layers if isinstance(slots, int) else slots
        split = Split(
            backend=PORTABLE,
            slots=layers,
            cpu=CpuOps(experts=store),
            staging_bytes=2 * piece * self._expert_bytes(),
            stream_from=stream_from,
            adopt=adopt,
            store=store,
            usage=usage,
        )
        stream = mx.new_thread_unsafe_stream(mx.cpu)
        return build_decoder(self.gguf, PORTABLE, stream, split)

    def _store(self) -> ExpertStore:
        plan = make_plan(self.gguf, self.geometry, 96)
        placement = place(self.gguf, self.geometry, plan, None, pooled=True)
        return ExpertStore(self.gguf, self.geometry, placement)

    def _expert_bytes(self) -> int:
        routed = [t for t in self.gguf.tensors.values() if "_exps." in t.name]
        return sum(t.nbytes for t in routed) // self.geometry.moe_layers // self.geometry.experts


@pytest.fixture
def build(path: Path) -> Iterator[Callable[..., MlxDecoder]]:
    builder = Builder(path)
    with builder.gguf:
        yield builder


def run(decoder: MlxDecoder, ids: Sequence[int], steps: Sequence[int]) -> Floats:
    rows = decoder.new_cache(96, "f32")
    parts = [
        decoder.forward(np.asarray(ids[start:end], np.int32), rows, last_only=False)
        for start, end in pairwise([0, *steps])
    ]
    return np.concatenate(parts)


def pieces(ids: Sequence[int]) -> list[int]:
    """A long piece, a short one, and single tokens."""
    return [len(ids) - 12, len(ids) - 4, *range(len(ids) - 3, len(ids) + 1)]


def splits(decoder: MlxDecoder) -> list[SplitMoe]:
    found = [layer.feed_forward for layer in decoder.layers]
    return [layer for layer in found if isinstance(layer, SplitMoe)]


CASES: dict[str, dict[str, Any]] = {
    "none on the device": {"slots": 0},
    "some on the device": {"slots": 3},
    "from a store": {"slots": 3, "stored": True},
    "long prompts staged": {"slots": 3, "stream_from": 8},
    "long prompts staged from a store": {"slots": 2, "stream_from": 8, "stored": True},
    "all staged, one at a time": {"slots": 0, "stream_from": 1, "piece": 1},
    "misses take slots": {"slots": 4, "stream_from": 1, "adopt": True},
    "misses take slots, from a store": {
        "slots": 4,
        "stream_from": 1,
        "adopt": True,
        "stored": True,
    },
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_golden_logits(
    build: Callable[..., MlxDecoder], variant: str, case: dict[str, Any]
) -> None:
    """As transformers computes them, wherever the experts lie."""
    ids, expected = golden(variant)
    assert_close(run(build(**case), ids, pieces(ids)), expected)


def test_layers_may_differ(build: Callable[..., MlxDecoder], variant: str, path: Path) -> None:
    """Of the first layer with experts none on the device, of the others all."""
    ids, expected = golden(variant)
    geometry = models.read_geometry(GGUFFile.open(path))
    slots = [0] + [geometry.experts] * (geometry.moe_layers - 1)
    decoder = build(slots)
    assert len(splits(decoder)) == 1
    assert_close(run(decoder, ids, pieces(ids)), expected)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_run_can_be_repeated(
    build: Callable[..., MlxDecoder], variant: str, case: dict[str, Any]
) -> None:
    """To the bit, though experts move meanwhile."""
    ids, _ = golden(variant)
    first, second = (run(build(**case), ids, pieces(ids)) for _ in range(2))
    assert (first == second).all()


def test_every_choice_is_counted(build: Callable[..., MlxDecoder], variant: str) -> None:
    ids, _ = golden(variant)
    whole, split = build(10**6), build(3)
    used = split.geometry.experts_used
    for decoder in (whole, split):
        run(decoder, ids, pieces(ids))
    for one, other in zip(whole.layers, split.layers, strict=True):
        if hasattr(one.feed_forward, "uses"):
            uses = one.feed_forward.uses()
            assert uses.sum() == used * len(ids)
            assert (uses == other.feed_forward.uses()).all()  # type: ignore[attr-defined]


def test_what_is_used_most_moves_to_the_device(
    build: Callable[..., MlxDecoder], variant: str
) -> None:
    ids, _ = golden(variant)
    decoder = build(3)
    rows = decoder.new_cache(96, "f32")
    before = [list(layer.slots.experts) for layer in splits(decoder)]
    assert all(experts == [0, 1, 2] for experts in before)
    for _ in range(12):
        rows.truncate(0)
        decoder.forward(np.asarray(ids, np.int32), rows)
    for layer in splits(decoder):
        inside = np.zeros(decoder.geometry.experts, np.bool_)
        inside[layer.slots.experts] = True
        scores = layer.hot.scores
        assert scores[inside].min() > scores[~inside].max() - 8.1
        assert (layer.slots.of[layer.slots.experts] == np.arange(3)).all()
        assert (layer.slots.of >= 0).sum() == 3
        assert layer.hits > 0


def test_earlier_uses_choose_the_first_experts(
    build: Callable[..., MlxDecoder], path: Path
) -> None:
    geometry = models.read_geometry(GGUFFile.open(path))
    usage = np.zeros((geometry.moe_layers, geometry.experts), np.uint32)
    usage[:, 5], usage[:, 2] = 9, 4
    assert all(layer.slots.experts == [2, 5] for layer in splits(build(2, usage=usage)))

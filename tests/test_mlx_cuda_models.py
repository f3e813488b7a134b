"""Whole models on the CUDA backend, its kernels run by the emulator."""

from __future__ import annotations

from functools import cache, partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
from checkpoints import VARIANTS, golden_config, golden_shapes, make_weights, write_checkpoint
from lockstep import COMPILER, NO_COMPILER, Lockstep
from test_golden import assert_close, convert_variant, golden
from test_ops_mlx import requantize

import localds
from convert import convert_checkpoint
from localds.gguf import GGMLType, GGUFFile

mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'mlx[cpu]'")

from cuda_emulator import emulated_cuda  # noqa: E402

from localds.ops.mlx import build_decoder  # noqa: E402
from localds.ops.mlx.cuda import CudaBackend  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

pytestmark = pytest.mark.skipif(COMPILER is None, reason=NO_COMPILER)


@pytest.fixture(scope="module", autouse=True)
def launched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The names of the kernels that ran."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    with emulated_cuda(Lockstep(tmp_path_factory.mktemp("cuda"))) as names:
        yield names
    mx.set_default_device(before)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """GGUF files of the golden variants, each made once."""
    return cache(partial(convert_variant, folder=tmp_path_factory.mktemp("cuda_models")))


def run(path: Path, ids: Sequence[int], ends: Sequence[int], cache_type: str = "f32") -> Floats:
    """Logits of `ids`, in pieces that end at `ends`."""
    with GGUFFile.open(path) as model:
        decoder = build_decoder(model, CudaBackend(), mx.new_thread_unsafe_stream(mx.cpu))
        rows = decoder.new_cache(96, cache_type)
        parts = [
            decoder.forward(np.asarray(ids[start:end], np.int32), rows, last_only=False)
            for start, end in pairwise([0, *ends])
        ]
    return np.concatenate(parts)


@pytest.mark.parametrize("name", ["v2-lite", "v3"])
def test_golden_logits(files: Callable[[str], Path], name: str) -> None:
    """Few tokens at once, then token by token."""
    ids, expected = golden(name)
    assert_close(run(files(name), ids[:12], [8, *range(9, 13)]), expected[:12])


def test_a_quantized_model(files: Callable[[str], Path], tmp_path: Path) -> None:
    """As the CPU path computes with the same values in float32, which it does not round."""
    quantized, plain = tmp_path / "quantized.gguf", tmp_path / "plain.gguf"
    requantize(files("v2-lite"), quantized, plain, GGMLType.Q5_0)
    ids, _ = golden("v2-lite")
    with localds.load(plain) as model:
        expected = model.logits(ids[:12])
    assert_close(run(quantized, ids[:12], [8, *range(9, 13)]), expected)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """v2-lite with rows of 64 and 64 values, which the kernels of attention take."""
    folder = tmp_path_factory.mktemp("wide")
    config = golden_config("v2-lite") | {"kv_lora_rank": 64, "qk_rope_head_dim": 64}
    hidden, heads, nope = 64, 4, config["qk_nope_head_dim"]
    changed = {
        "q_proj": (heads * (nope + 64), hidden),
        "kv_a_proj_with_mqa": (128, hidden),
        "kv_a_layernorm": (64,),
        "kv_b_proj": (heads * (nope + config["v_head_dim"]), 64),
    }
    shapes = {
        name: changed.get(name.split(".")[-2], shape)
        for name, shape in golden_shapes("v2-lite").items()
    }
    write_checkpoint(folder / "checkpoint", config, make_weights(shapes, 1))
    convert_checkpoint(folder / "checkpoint", folder / "m.gguf", pre=VARIANTS["v2-lite"].pre)
    return folder / "m.gguf"


@pytest.mark.parametrize("cache_type", ["f32", "q8_0"])
def test_attention_in_a_model(wide: Path, cache_type: str, launched: list[str]) -> None:
    ids, _ = golden("v2-lite")
    ids = ids[:12]
    with localds.load(wide) as model:
        session = model.session(context=96, cache_type=cache_type)
        expected = session.evaluate(ids, all_logits=True)
    launched.clear()
    logits = run(wide, ids, [8, *range(9, 13)], cache_type)
    assert launched.count("merge") >= 4 * 3
    if cache_type == "f32":
        assert_close(logits, expected)
    else:
        error = np.sqrt(np.mean((logits - expected) ** 2, axis=1))
        assert np.median(error) < 0.01 * expected.std()

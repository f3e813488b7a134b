"""The emulator that runs GPU kernels: what it computes, and what it finds out."""

from __future__ import annotations

import numpy as np
import pytest
from lockstep import COMPILER, NO_COMPILER, Lockstep, LockstepError
from numpy.typing import NDArray

pytestmark = pytest.mark.skipif(COMPILER is None, reason=NO_COMPILER)

SUM = """
using namespace lockstep;
void sum(const float* x, float* y) {
  const unsigned at = block_index.x * block_size.x + thread_index.x;
  float total = x[at];
  for (int step = 16; step > 0; step /= 2) total += exchange(total, lane() ^ step);
  y[at] = total;
}
"""
CALL = "sum(buffer<const float>(0), buffer<float>(1));"
BLOCKS, THREADS = 3, 64


@pytest.fixture(scope="module")
def lockstep(tmp_path_factory: pytest.TempPathFactory) -> Lockstep:
    return Lockstep(tmp_path_factory.mktemp("lockstep"))


def run(lockstep: Lockstep, source: str, blocks: int = BLOCKS) -> NDArray[np.float32]:
    x = np.arange(BLOCKS * THREADS, dtype=np.float32)
    y = np.full_like(x, np.nan)
    lockstep.run(source, CALL, [x, y], blocks=(blocks,), threads=(THREADS,))
    return y


def test_lanes_exchange_values(lockstep: Lockstep) -> None:
    y = run(lockstep, SUM).reshape(-1, 32)
    x = np.arange(BLOCKS * THREADS).reshape(-1, 32)
    assert (y == x.sum(axis=1, keepdims=True)).all()


def test_blocks_share_memory(lockstep: Lockstep) -> None:
    """Each thread reads what one of the other warp wrote before the barrier."""
    source = """
    using namespace lockstep;
    void turn(const float* x, float* y, int n) {
      static float shared[64];
      shared[thread_index.x] = x[thread_index.x];
      block_barrier();
      y[thread_index.x] = shared[n - 1 - thread_index.x];
    }
    """
    x, y = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    call = "turn(buffer<const float>(0), buffer<float>(1), scalar<int>(0));"
    lockstep.run(source, call, [x, y], [64], blocks=(1,), threads=(64,))
    assert (y == x[::-1]).all()


def test_grids_of_three_dimensions(lockstep: Lockstep) -> None:
    source = """
    using namespace lockstep;
    void mark(int* y) {
      const unsigned block = block_index.x + 2 * (block_index.y + 3 * block_index.z);
      const unsigned thread = thread_index.x + 8 * (thread_index.y + 2 * thread_index.z);
      y[32 * block + thread] = 32 * block + thread;
    }
    """
    y = np.full(6 * 2 * 32, -1, np.int32)
    lockstep.run(source, "mark(buffer<int>(0));", [y], blocks=(2, 3, 2), threads=(8, 2, 2))
    assert (y == np.arange(len(y))).all()


WRONG = {
    "reads past a buffer": ("x[at]", "x[at + 4096]", "leaves its buffers"),
    "reads before a buffer": ("x[at]", "x[at - 4096 * 8]", "leaves its buffers"),
    "writes just past a buffer": ("y[at]", "y[at + 1]", "leaves its buffers"),
    "is not aligned": ("x[at]", "*(float*)((char*)(x + at) + 2)", "misaligned"),
    "leaves a lane behind": (
        "float total",
        "if (lane() == 5) return; float total",
        "a warp do not",
    ),
    "leaves a warp behind": (
        "float total",
        "if (thread_index.x < 32) block_barrier(); float total",
        "warps of a block do not",
    ),
    "does not compile": ("x[at]", "z[at]", "does not compile"),
}


@pytest.mark.parametrize(("old", "new", "message"), WRONG.values(), ids=WRONG)
def test_wrong_kernels_are_found_out(lockstep: Lockstep, old: str, new: str, message: str) -> None:
    with pytest.raises(LockstepError, match=message):
        run(lockstep, SUM.replace(old, new))
    run(lockstep, SUM)  # and the emulator is not broken by it


def test_writes_in_the_slack_of_a_buffer_are_found_out(lockstep: Lockstep) -> None:
    source = "void write(float* y) { y[lockstep::thread_index.x] = 1; }"
    with pytest.raises(LockstepError, match="past the end"):
        lockstep.run(
            source,
            "write(lockstep::buffer<float>(0));",
            [np.zeros(31, np.float32)],
            blocks=(1,),
            threads=(32,),
        )

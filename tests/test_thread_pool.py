"""The thread pool, seen through calls that use it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from localds import _native

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    before = _native.threads()
    yield
    _native.set_threads(before)


def product_case(rows: int = 3000) -> tuple[_native.Matrix, np.ndarray, np.ndarray]:
    """A matrix of small whole numbers, x, and their exact product."""
    random = np.random.default_rng(0)
    weights = random.integers(-8, 8, (rows, 64)).astype(np.float32)
    x = random.integers(-8, 8, (3, 64)).astype(np.float32)
    matrix = _native.Matrix(0, rows, 64, 1, weights.view(np.uint8).reshape(-1))
    return matrix, x, x @ weights.T


def test_every_number_of_threads_does_every_task_once() -> None:
    matrix, x, expected = product_case()
    for threads in (1, 2, 5, 3, 1, 4):
        _native.set_threads(threads)
        assert _native.threads() == threads
        for _ in range(50):
            np.testing.assert_array_equal(_native.matmul(matrix, x), expected)


def test_callers_take_turns() -> None:
    matrix, x, expected = product_case()
    right = []

    def call() -> None:
        right.extend(np.array_equal(_native.matmul(matrix, x), expected) for _ in range(100))

    _native.set_threads(3)
    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for threads in (2, 4, 3):
        _native.set_threads(threads)
    for caller in callers:
        caller.join()
    assert right == [True] * 400


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_computes() -> None:
    script = Path(__file__).with_name("forked_child.py")
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout.split() == ["0", "True"], done.stderr


@pytest.mark.parametrize("threads", [0, -1, 100000])
def test_impossible_numbers_of_threads(threads: int) -> None:
    with pytest.raises(ValueError, match=f"threads: {threads} is not between 1 and"):
        _native.set_threads(threads)


def test_default_respects_affinity() -> None:
    assert 1 <= _native.default_threads() <= (os.cpu_count() or 1)
    if not hasattr(os, "sched_setaffinity"):
        return
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert _native.default_threads() == 1
    finally:
        os.sched_setaffinity(0, allowed)

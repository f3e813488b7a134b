"""Forks after the pool has started; the child computes too. Prints its exit status, a verdict."""

from __future__ import annotations

import os

import numpy as np

from localds import _native

_native.set_threads(3)
weights = np.ones((4000, 64), np.float32)
matrix = _native.Matrix(0, 4000, 64, 1, weights.view(np.uint8).reshape(-1))
x = np.ones((1, 64), np.float32)


def right() -> bool:
    return bool((_native.matmul(matrix, x) == 64).all())


before = right()
child = os.fork()
if child == 0:
    os._exit(0 if right() and _native.threads() == 3 else 1)
print(os.waitpid(child, 0)[1], before and right())

"""Functions with gradients of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import mlx.core as mx

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
R = TypeVar("R")


def with_vjp(function: Callable[P, R], vjp: Callable[..., Any]) -> Callable[P, R]:
    """`function` of arrays, whose gradient is `vjp(arguments, cotangents, results)`.

    What the functions take from around them counts as constant. They may evaluate what they are
    given, and compute on the host.
    """
    custom = mx.custom_function(function)
    custom.vjp(vjp)
    return cast("Callable[P, R]", custom)


def differentiable(
    x: mx.array,
    forward: Callable[[mx.array], mx.array],
    backward: Callable[[mx.array], mx.array],
) -> mx.array:
    """Forward(x), linear in x, whose gradient is backward(dy)."""
    return with_vjp(forward, lambda _, dy, __: backward(dy))(x)

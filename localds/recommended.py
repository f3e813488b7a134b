"""How a model's makers say that it should be sampled: `general.sampling.*` in its file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from localds.sampling import SamplingParams

if TYPE_CHECKING:
    from localds.gguf.metadata import TypedMetadata

_NUMBERS = {
    "temp": "temperature",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
_INTEGERS = {"top_k": "top_k", "penalty_last_n": "penalty_window"}


def recommended_sampling(gguf: TypedMetadata) -> dict[str, Any]:
    """The fields of `SamplingParams` for which the file has a value.

    The keys are those of llama.cpp, where a `top_k` below 1 is off. Raises `GGUFError` for a value
    that cannot be meant.
    """
    found: dict[str, Any] = {}
    for names, read in ((_NUMBERS, gguf.number), (_INTEGERS, gguf.integer)):
        for key, field in names.items():
            value = read(f"general.sampling.{key}", None)
            if value is None:
                continue
            setting: dict[str, Any] = {field: max(value, 0) if field == "top_k" else value}
            try:
                SamplingParams(**setting)
            except ValueError as error:
                raise gguf.wrong(f"general.sampling.{key}", str(error)) from None
            found |= setting
    return found

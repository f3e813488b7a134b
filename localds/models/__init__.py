"""Architectures: one file each, chosen here by GGUF's `general.architecture`."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from localds.gguf import GGUFError
from localds.models import deepseek2, mixtral

if TYPE_CHECKING:
    from localds.gguf import GGUFFile
    from localds.models.decoder import Decoder
    from localds.models.geometry import Geometry
    from localds.ops import Ops

X = TypeVar("X")


def build(gguf: GGUFFile, ops: Ops[X]) -> Decoder[X]:
    """Prepare the model in `gguf` on a device; raises `GGUFError` for what cannot be run."""
    match _supported(gguf):
        case "deepseek2":
            return deepseek2.build(gguf, ops)
        case _:
            return mixtral.build(gguf, ops)


def read_geometry(gguf: GGUFFile) -> Geometry:
    """The model's sizes, from metadata alone; raises `GGUFError` for what cannot be run."""
    match _supported(gguf):
        case "deepseek2":
            return deepseek2.geometry(deepseek2.read_config(gguf))
        case _:
            return mixtral.geometry(mixtral.read_config(gguf))


def _supported(gguf: GGUFFile) -> str:
    architecture = gguf.architecture
    if architecture not in ("deepseek2", "llama"):
        raise GGUFError(
            f"{gguf.path}: architecture {architecture!r} is not one that localds runs; "
            "it runs 'deepseek2' (DeepSeek V2 to V3.1, Kimi-K2, Moonlight, GLM-4.7-Flash) and "
            "'llama' with experts (Mixtral)"
        )
    return architecture

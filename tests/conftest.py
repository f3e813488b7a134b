"""A small complete model, made once per run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from checkpoints import VARIANTS, golden_config, golden_shapes, make_weights, write_checkpoint

from convert import convert_checkpoint

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of the "v3" variant: random weights, a byte-level vocabulary, no template."""
    folder = tmp_path_factory.mktemp("tiny")
    variant = VARIANTS["v3"]
    weights = make_weights(golden_shapes("v3"), variant.seed)
    write_checkpoint(folder / "checkpoint", golden_config("v3"), weights)
    path = folder / "tiny.gguf"
    convert_checkpoint(folder / "checkpoint", path, pre=variant.pre)
    return path

"""llama.cpp opens our split files as the model that they are parts of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from checkpoints import write_checkpoint
from llama_cpp import find_llama_cpp
from test_interop import IDS, MODELS, VOCABULARY, shapes, weight

from convert import convert, open_source

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.interop


def test_split_files_compute_what_the_whole_one_does(tmp_path: Path) -> None:
    llama_cpp = find_llama_cpp(tmp_path)
    architecture, values = MODELS["v3"]
    config = {**values, "architectures": [architecture]}
    weights = {name: weight(name, shape) for name, shape in shapes(config).items()}
    write_checkpoint(tmp_path / "hf", config, weights)
    source = open_source(str(tmp_path / "hf"), pre="deepseek-llm")
    [whole] = convert(source, tmp_path / "whole.gguf", recipe="Q8_0")
    size = whole.stat().st_size
    parts = convert(source, tmp_path / "m.gguf", recipe="Q8_0", split=size // 3)
    assert len(parts) > 2
    expected = llama_cpp.logits(whole, IDS, 4, VOCABULARY)
    np.testing.assert_array_equal(llama_cpp.logits(parts[0], IDS, 4, VOCABULARY), expected)

"""Types of all tensors as llama-quantize chooses them, for every preset."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from llama_cpp import LlamaCpp, find_llama_cpp
from test_interop import MODELS, shapes, weight

from convert import convert_checkpoint, open_source
from convert.presets import PRESETS
from convert.recipes import choose_types
from localds.gguf import GGUFFile

pytestmark = pytest.mark.interop


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> LlamaCpp:
    return find_llama_cpp(tmp_path_factory.mktemp("llama_cpp"))


@pytest.fixture(scope="module", params=[*MODELS, "v3, tied", "mixtral, 4 experts"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name, _, change = request.param.partition(", ")
    changes = {
        "tied": {"tie_word_embeddings": True},
        "4 experts": {"num_local_experts": 4, "num_hidden_layers": 18},
        "": {},
    }[change]
    architecture, values = MODELS[name]
    config = {**values, **changes, "architectures": [architecture]}
    folder = tmp_path_factory.mktemp("recipes")
    tensors = shapes(config)
    if change == "tied":
        del tensors["lm_head.weight"]
    write_checkpoint(folder / "hf", config, {n: weight(n, s) for n, s in tensors.items()})
    convert_checkpoint(folder / "hf", folder / "model.gguf", pre="deepseek-llm")
    return folder / "model.gguf"


@pytest.mark.parametrize("preset", PRESETS)
def test_types(llama_cpp: LlamaCpp, model: Path, tmp_path: Path, preset: str) -> None:
    theirs = llama_cpp.quantize(model, tmp_path / "theirs.gguf", preset)
    source = open_source(str(model))
    ours = choose_types(source, preset, [], None)
    with GGUFFile.open(theirs) as file:
        expected = {name: tensor.type.name for name, tensor in file.tensors.items()}
        assert file.integer("general.file_type") == PRESETS[preset].file_type
    found = {t.name: kind.name for t, kind in zip(source.targets, ours, strict=True)}
    assert found == expected

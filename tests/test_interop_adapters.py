"""Our GGUF adapters in llama.cpp: the same logits as the merged model, where it applies them.

Needs LOCALDS_LLAMA_CPP (see tests/llama_cpp.py).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from adapter_cases import ATTENTION, DENSE, EXPERTS, ROUTER, Case
from checkpoints import VOCABULARY, token_ids
from derive_gguf import fused_gate_up
from llama_cpp import LlamaCpp, find_llama_cpp

import localds
from localds.adapters import Base, inert_in_llama_cpp, read_adapter, write_gguf_adapter
from localds.gguf import GGUFFile

pytestmark = pytest.mark.interop

IDS = token_ids(3, 24)
O_PROJ = r"self_attn\.o_proj"
EFFECTIVE = f"{O_PROJ}|{DENSE}|{EXPERTS}|{ROUTER}"
CASES = {
    "mixtral": Case("mixtral"),
    "mixtral, rslora": Case("mixtral", rslora=True),
    "v3": Case("v3", modules=EFFECTIVE),
    "v3, rslora": Case("v3", modules=EFFECTIVE, rslora=True),
    "glm-4.7-flash": Case("glm-4.7-flash", modules=EFFECTIVE),
}


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> LlamaCpp:
    return find_llama_cpp(tmp_path_factory.mktemp("llama_cpp"))


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_applies_our_adapters(
    llama_cpp: LlamaCpp, tmp_path: Path, name: str, scale: float
) -> None:
    case = CASES[name]
    plain = case.gguf(tmp_path / "plain.gguf")
    forms = [plain]
    if case.variant == "v3":
        forms.append(fused_gate_up(plain, tmp_path / "fused.gguf"))
    for path in forms:
        base = Base.of(GGUFFile.open(path))
        adapter = read_adapter(case.folder(tmp_path / "adapter"), base)
        assert not inert_in_llama_cpp(adapter, base.architecture)
        file = tmp_path / "adapter.gguf"
        write_gguf_adapter(file, adapter, base)
        theirs = llama_cpp.logits(path, IDS, 1, VOCABULARY, (file, scale))
        with localds.load(path, "cpu", adapters=[(file, scale)]) as model:
            ours = model.logits(IDS)
        without = llama_cpp.logits(path, IDS, 1, VOCABULARY)
        # Their cache is in F16.
        assert np.abs(ours - theirs).max() < 0.02 * np.abs(ours).max()
        assert np.abs(without - theirs).max() > 0.2 * np.abs(ours).max()


def test_llama_cpp_ignores_what_we_say_it_does(llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    case = Case("v3", modules=ATTENTION)
    plain = case.gguf(tmp_path / "plain.gguf")
    base = Base.of(GGUFFile.open(plain))
    adapter = read_adapter(case.folder(tmp_path / "adapter"), base)
    inert = inert_in_llama_cpp(adapter, base.architecture)
    for name in [*adapter.tree]:
        if name not in inert or name.endswith("attn_kv_b"):
            del adapter.tree[name]
    write_gguf_adapter(tmp_path / "adapter.gguf", adapter, base)
    with_, without = (
        llama_cpp.logits(plain, IDS, 1, VOCABULARY, chosen)
        for chosen in ((tmp_path / "adapter.gguf", 1.0), None)
    )
    np.testing.assert_array_equal(with_, without)

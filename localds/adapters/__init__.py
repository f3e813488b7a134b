"""Low-rank adapters: their files (PEFT's and GGUF's), merging, and running a model with them.

Pairs of matrices lie in a tree by the names of GGUF tensors, see `adapter.Tree`. No MLX here.
"""

from __future__ import annotations

from localds.adapters.adapter import Adapter, AdapterError, Floats, Pair, Tree
from localds.adapters.apply import Applied, apply
from localds.adapters.base import Base, Matrix
from localds.adapters.gguf_file import inert_in_llama_cpp, read_gguf_adapter, write_gguf_adapter
from localds.adapters.merge import merged, patches
from localds.adapters.names import targets_of
from localds.adapters.peft_read import read_peft
from localds.adapters.peft_write import write_peft
from localds.adapters.read import parse_adapter, read_adapter, read_adapters

__all__ = [
    "Adapter",
    "AdapterError",
    "Applied",
    "Base",
    "Floats",
    "Matrix",
    "Pair",
    "Tree",
    "apply",
    "inert_in_llama_cpp",
    "merged",
    "parse_adapter",
    "patches",
    "read_adapter",
    "read_adapters",
    "read_gguf_adapter",
    "read_peft",
    "targets_of",
    "write_gguf_adapter",
    "write_peft",
]

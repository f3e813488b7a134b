"""The GGUF container: parse, validate and map a model file, alone or split into parts.

`GGUFFile.open` reads everything but the tensors' data, which stay where they are in the memory map.
"""

from __future__ import annotations

from localds.gguf.error import GGUFError
from localds.gguf.file import GGUFFile
from localds.gguf.metadata import Value
from localds.gguf.tensor import Tensor
from localds.gguf.types import GGMLType

__all__ = ["GGMLType", "GGUFError", "GGUFFile", "Tensor", "Value"]

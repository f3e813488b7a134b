"""Look-up of a model's tensors by name, with errors that say what is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from localds.gguf import GGUFError

if TYPE_CHECKING:
    from localds.gguf import GGUFFile, Tensor


class Weights:
    """The tensors of a file, or of one of its blocks (`prefix` "blk.3.")."""

    def __init__(self, gguf: GGUFFile, prefix: str = "") -> None:
        self._gguf = gguf
        self._prefix = prefix

    def block(self, index: int) -> Weights:
        """The tensors of layer `index`."""
        return Weights(self._gguf, f"blk.{index}.")

    def find(self, name: str) -> Tensor | None:
        """The tensor `name`, ".weight" added unless the name has a dot; None where absent."""
        return self._gguf.tensors.get(self._full(name))

    def __getitem__(self, name: str) -> Tensor:
        """Like `find`, but raises `GGUFError` where the tensor is absent."""
        tensor = self.find(name)
        if tensor is None:
            raise GGUFError(
                f"{self._gguf.path}: tensor {self._full(name)!r} is missing, which a "
                f"{self._gguf.architecture!r} model with this metadata needs; "
                "convert the checkpoint again or fetch the complete file"
            )
        return tensor

    def _full(self, name: str) -> str:
        return self._prefix + (name if "." in name else name + ".weight")

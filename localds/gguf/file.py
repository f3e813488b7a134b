"""Opening a model: one file, or the parts of a split one, as a single set of tensors."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from localds.gguf.mapping import give_back
from localds.gguf.metadata import Metadata, TypedMetadata
from localds.gguf.parse import Part
from localds.gguf.splits import merge_tensors, open_parts
from localds.gguf.tensor import Tensor
from localds.gguf.validate import validate


class GGUFFile(TypedMetadata):
    """A model file: its metadata (of a split model, those of the first part) and all tensors.

    `paths` are the files, `file_bytes` their sizes together. The data are mapped, not read: the
    files must not be changed or cut short while a tensor is in use, or the system ends the program
    with SIGBUS, which cannot be caught here.
    """

    def __init__(self, parts: list[Part]) -> None:
        super().__init__(parts[0].path, Metadata(parts[0].entries))
        self.version = parts[0].version
        self.paths = [part.path for part in parts]
        self.file_bytes = sum(part.size for part in parts)
        self.tensors: dict[str, Tensor] = merge_tensors(parts)
        self._mapped = dict(self.tensors)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a model; of a split one, `path` is the first part and the others lie beside it.

        Raises `GGUFError` for whatever keeps the file from being read as a model.
        """
        gguf = cls(open_parts(Path(path)))
        validate(gguf)
        return gguf

    @property
    def architecture(self) -> str:
        """The key `general.architecture`, such as "deepseek2"."""
        return self.text("general.architecture")

    def give_back(self, tensor: Tensor) -> None:
        """Take a tensor's pages out of this process's memory, unless they are no part of the map.

        For data that were copied elsewhere; reading them brings them back.
        """
        if self._mapped.get(tensor.name) is tensor:
            give_back(tensor.data)

    def close(self) -> None:
        """Forget metadata and tensors. The map goes with the last view of its data."""
        self.metadata = Metadata({})
        self.tensors = {}
        self._mapped = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

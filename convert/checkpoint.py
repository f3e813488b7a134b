"""Published checkpoints: a folder with config.json and safetensors files, read piece by piece."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from convert.config import CheckpointError, Config, language_model, read_json
from convert.files import fits_in_memory, read_bytes
from convert.quantization import read_quantization
from convert.safetensors import StoredTensor, read_header

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Checkpoint", "CheckpointError", "Config", "StoredTensor", "read_json"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Checkpoint:
    """A checkpoint folder: its config (`text`: of the language model in it) and its tensors.

    Files are opened for each read, by any number of threads. Where they are larger than half of
    the machine's memory, what was read leaves the page cache at once; otherwise it may stay for a
    second look.
    """

    def __init__(self, folder: Path) -> None:
        """Open `folder`. Raises `CheckpointError` for missing or damaged files."""
        self.folder = folder
        self.config = Config(read_json(folder / "config.json"))
        self.text = language_model(self.config)
        self.quantization = read_quantization(self.text)
        self.tensors: dict[str, StoredTensor] = {}
        for file in _weight_files(folder):
            for tensor in read_header(file):
                if tensor.name in self.tensors:
                    raise CheckpointError(
                        f"{file}: tensor {tensor.name!r} is also in "
                        f"{self.tensors[tensor.name].file.name}"
                    )
                self.tensors[tensor.name] = tensor
        _check_index(folder, self.tensors)
        total = sum(tensor.nbytes for tensor in self.tensors.values())
        self._keeps_pages = fits_in_memory(total)

    def find(self, name: str) -> StoredTensor:
        """Where `name` lies. Raises `CheckpointError` if the checkpoint has no such tensor."""
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.folder}: no tensor {name!r} in the checkpoint; "
                "check that all of its safetensors files are there"
            )
        return self.tensors[name]

    def read_bytes(self, tensor: StoredTensor, offset: int, count: int) -> NDArray[np.uint8]:
        """Read `count` bytes of a tensor's data, from `offset` on.

        Raises `CheckpointError` if the file has been cut short or removed.
        """
        what = f"tensor {tensor.name!r}"
        return read_bytes(tensor.file, tensor.start + offset, count, what, keep=self._keeps_pages)


def _weight_files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files: those of the index, or the single one."""
    if not (folder / INDEX).exists():
        single = folder / SINGLE
        if not single.exists():
            raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX} is there")
        return [single]
    files = [folder / name for name in sorted(set(weight_map(folder / INDEX).values()))]
    for file in files:
        if not file.exists():
            raise CheckpointError(f"{file}: listed in the index, but not there; download it again")
    return files


def weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, as an index says. A name leads nowhere but into the folder."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{index}: weight_map is missing")
    return {name: Path(str(file)).name for name, file in files.items()}


def _check_index(folder: Path, tensors: dict[str, StoredTensor]) -> None:
    if not (folder / INDEX).exists():
        return
    absent = [name for name in weight_map(folder / INDEX) if name not in tensors]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise CheckpointError(
            f"{folder / INDEX}: tensor {absent[0]!r}{more} is listed in the index, but in no file; "
            "download the checkpoint again"
        )

"""What a training run leaves: the adapter in PEFT's form and as GGUF, and what to know of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from localds.adapters import (
    Adapter,
    AdapterError,
    Base,
    inert_in_llama_cpp,
    write_gguf_adapter,
    write_peft,
)
from localds.adapters.biases import BIASES_FILE
from localds.adapters.names import split_name

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import mlx.core as mx

    from localds.finetune.config import AdapterConfig
    from localds.finetune.loop import Params
    from localds.gguf import GGUFFile

GGUF_FILE = "adapter.gguf"
_HUB = "https://huggingface.co/"


@dataclass(frozen=True, slots=True)
class Written:
    """The folder, the GGUF adapter in it (None if there is none), and what a person should know."""

    folder: Path
    gguf: Path | None
    notes: tuple[str, ...]


def write_results(
    folder: Path,
    gguf: GGUFFile,
    config: AdapterConfig,
    params: Params,
    biases: Mapping[str, mx.array],
    *,
    as_gguf: bool = True,
) -> Written:
    """Write an adapter of the model in `gguf`; every file is replaced once it is complete.

    Raises `OSError` where the disk refuses.
    """
    base = Base.of(gguf)
    tree = {
        name: {leaf: np.array(array, np.float32) for leaf, array in pair.items()}
        for name, pair in params.items()
    }
    moved = {name: np.array(bias, np.float32) for name, bias in biases.items()}
    adapter = Adapter(folder.name, config, tree, _base_model(gguf), biases=moved)
    notes = write_peft(folder, adapter, base)
    if biases:
        notes.append(
            f"the router's biases moved as well, and no adapter file can hold them: {BIASES_FILE} "
            "has them; localds reads it with the folder, and for other programs merge the adapter "
            "(localds convert MODEL --merge)"
        )
    file = folder / GGUF_FILE
    written = None
    if not as_gguf:
        file.unlink(missing_ok=True)  # of a run that was resumed with other options
    else:
        try:
            write_gguf_adapter(file, adapter, base)
            written = file
            notes += _inert(adapter, gguf.architecture)
        except AdapterError as error:
            file.unlink(missing_ok=True)  # of a run that was resumed with other options
            notes.append(f"no GGUF adapter was written: {error}")
    return Written(folder, written, tuple(notes))


def _inert(adapter: Adapter, architecture: str) -> list[str]:
    names = inert_in_llama_cpp(adapter, architecture)
    if not names:
        return []
    kinds = sorted({split_name(name)[1] for name in names})
    share = "all" if len(names) == len(adapter.tree) else f"{len(names)} of {len(adapter.tree)}"
    return [
        f"llama.cpp would ignore {share} of the tensors in {GGUF_FILE} ({', '.join(kinds)}): "
        "merge the adapter for it, with localds convert MODEL --merge"
    ]


def _base_model(gguf: GGUFFile) -> str | None:
    """The repository that a file was made from, where it says so, or the model's name."""
    url = gguf.text("general.source.repo_url", "")
    if url.startswith(_HUB):
        return url.removeprefix(_HUB).strip("/")
    return gguf.text("general.name", "") or None

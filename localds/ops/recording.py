"""What weights were multiplied with: per column, the sum of the squared inputs.

This says which columns of a weight matter most when it is quantized. Layers that a device prepares
with a `Recording` add to it whenever they run; others pay nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from localds import _native

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from localds.gguf import Tensor


@dataclass(frozen=True, slots=True)
class InputSums:
    """What one weight was fed.

    `squares` float64 [matrices, columns] sums the squared inputs of each of the weight's matrices
    (experts or heads), `counts` int64 [matrices] says over how many tokens. Both are views that
    grow as the layer runs; weights with the same input share them.
    """

    squares: NDArray[np.float64]
    counts: NDArray[np.int64]


class Recording:
    """The sums of all layers prepared with it, by the names of their weights."""

    def __init__(self) -> None:
        self._inputs: dict[str, tuple[_native.Recorder, str]] = {}

    def recorder(self, **inputs: tuple[Tensor | None, ...]) -> _native.Recorder:
        """A recorder for one layer; says which weights share each of the layer's inputs."""
        recorder = _native.Recorder()
        for name, tensors in inputs.items():
            for tensor in tensors:
                if tensor is not None:
                    self._inputs[tensor.name] = recorder, name
        return recorder

    def sums(self) -> dict[str, InputSums]:
        """The sums so far, by tensor name; those of layers that did not run are left out."""
        found = {tensor: recorder.sums(name) for tensor, (recorder, name) in self._inputs.items()}
        return {tensor: InputSums(*sums) for tensor, sums in found.items() if sums is not None}

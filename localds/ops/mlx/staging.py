"""Routed experts on their way from the host to the device."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from localds.ops.tensors import row_stride

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from localds.gguf import Tensor
    from localds.memory.experts import ExpertStore
    from localds.ops.mlx.backend import Backend
    from localds.ops.mlx.feed_forward import Gated
    from localds.ops.mlx.matrix import Bytes

    Ids = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class HostExperts:
    """One layer's experts in RAM or on disk: `tensors` are gate, up and down, or gate_up and down.

    With a `store` they are read from there, as its layer `number`; without, from the file's map.
    """

    tensors: tuple[Tensor, ...]
    experts: int
    store: ExpertStore | None = None
    number: int = 0

    def read(self, ids: Ids) -> list[Bytes]:
        """The bytes of the experts `ids`, ascending: for each tensor [len(ids), rows, row bytes].

        Raises `ReadError`, an `OSError`, where the disk fails.
        """
        if self.store is not None:
            parts = self.store.fetch(self.number, ids)
            return [
                part.reshape(len(ids), tensor.shape[1], row_stride(tensor))
                for part, tensor in zip(parts, self.tensors, strict=True)
            ]
        return [
            tensor.data.reshape(self.experts, tensor.shape[1], row_stride(tensor))[ids]
            for tensor in self.tensors
        ]

    def load(self, backend: Backend, parts: Sequence[Bytes]) -> Gated:
        """Bring `parts` to the device: a stack of experts, or one expert."""
        gate, *up, down = (
            backend.load(tensor.type, part)
            for tensor, part in zip(self.tensors, parts, strict=True)
        )
        return backend.gated(gate, up[0] if up else None, down)


class Stager:
    """Reads experts for the device in a thread of its own, one piece ahead of who computes."""

    def __init__(self) -> None:
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="expert stager")
        self._expected: tuple[HostExperts, Ids, Future[list[Bytes]]] | None = None
        self._closed = False

    def read(self, host: HostExperts, pieces: Sequence[Ids]) -> Iterator[tuple[Ids, list[Bytes]]]:
        """Each of `pieces` with its bytes, while the next is being read.

        Raises `ReadError`, an `OSError`, where the disk fails, `ValueError` once this is closed.
        """
        if self._closed:
            raise ValueError("the model is closed; load it again")
        if not pieces:
            return
        waiting = self._take_expected(host, pieces[0])
        for number, piece in enumerate(pieces):
            parts = waiting.result()
            if number + 1 < len(pieces):
                waiting = self._reader.submit(host.read, pieces[number + 1])
            yield piece, parts

    def expect(self, host: HostExperts, piece: Ids) -> None:
        """Begin to read what `read` will probably be asked for first."""
        self.settle()
        self._expected = host, piece, self._reader.submit(host.read, piece)

    def settle(self) -> None:
        """Forget what was expected, once it is read: a store serves one at a time."""
        if self._expected is not None:
            self._expected[2].exception()
            self._expected = None

    def close(self) -> None:
        """End the thread."""
        self._expected = None
        self._closed = True
        self._reader.shutdown(cancel_futures=True)

    def _take_expected(self, host: HostExperts, piece: Ids) -> Future[list[Bytes]]:
        if self._expected is not None:
            expected_host, expected_piece, future = self._expected
            if expected_host is host and np.array_equal(expected_piece, piece):
                self._expected = None
                return future
        self.settle()
        return self._reader.submit(host.read, piece)

"""A SentencePiece model, written from what a GGUF file says about it.

SentencePiece reads models only as serialized protocol buffers (its sentencepiece_model.proto), so
the few fields that matter are written by hand, which spares a dependency on protobuf.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_VARINT, _LENGTH, _FLOAT = 0, 2, 5
_MODEL_TYPE_BPE = 2


def serialize(
    pieces: Sequence[bytes],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    byte_fallback: bool,
    add_dummy_prefix: bool,
) -> bytes:
    """Serialize a ModelProto of BPE pieces that leaves white space and characters as they are.

    `pieces` are UTF-8, `scores` float32 of log probability or negative rank, `types` as in GGUF.
    """
    encoded = bytearray()
    for piece, score, kind in zip(pieces, scores, types, strict=True):
        encoded += _bytes(1, _bytes(1, piece) + _float(2, score) + _integer(3, kind))
    trainer = (
        _integer(3, _MODEL_TYPE_BPE) + _integer(4, len(pieces)) + _integer(35, int(byte_fallback))
    )
    normalizer = (
        _bytes(1, b"identity")
        + _integer(3, int(add_dummy_prefix))
        + _integer(4, 0)  # remove_extra_whitespaces
        + _integer(5, 1)  # escape_whitespaces
    )
    return bytes(encoded) + _bytes(2, trainer) + _bytes(3, normalizer)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3 | _VARINT) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | _LENGTH) + _varint(len(value)) + value


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | _FLOAT) + struct.pack("<f", value)

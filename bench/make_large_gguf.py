"""Write a random-weight model of V2-Lite's geometry with any number of experts: files of any size.

usage: make_large_gguf.py OUT.gguf [--layers 27] [--experts 440]    (440 experts: 61 GB)

Weights are small, so that hidden states stay finite; nothing can be said with such a model, but
every byte is read and every operation done. Tensors are written one at a time.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

HIDDEN, FF, FF_EXPERT, HEADS, NOPE, ROPE, VALUE, RANK = 2048, 10944, 1408, 16, 128, 64, 128, 512
VOCABULARY = 8192
BLOCKS = {Type.Q4_K: (256, 144), Type.Q5_0: (32, 22), Type.Q6_K: (256, 210), Type.Q8_0: (32, 34)}
TILE = 16411  # blocks; a prime, so that no two experts are alike
RNG = np.random.default_rng(0)


def tile(kind: Type) -> NDArray[np.uint8]:
    """Random blocks of weights of about 0.02."""
    blocks = RNG.integers(0, 256, (TILE, BLOCKS[kind][1]), dtype=np.uint8)
    scale = {Type.Q4_K: 0.02 / 31.5 / 4.6, Type.Q5_0: 0.002, Type.Q6_K: 2e-5, Type.Q8_0: 3e-4}[kind]
    half = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    if kind == Type.Q6_K:
        blocks[:, 208:210] = half
    else:
        blocks[:, 0:2] = half
    if kind == Type.Q4_K:
        blocks[:, 2:4] = np.frombuffer(np.float16(scale * 7.5).tobytes(), np.uint8)
    return blocks.reshape(-1)


def tensors(layers: int, experts: int) -> Iterator[tuple[str, Type, tuple[int, ...]]]:
    """Names, types and shapes, the fastest dimension last."""
    yield "token_embd.weight", Type.Q4_K, (VOCABULARY, HIDDEN)
    yield "output.weight", Type.Q6_K, (VOCABULARY, HIDDEN)
    yield "output_norm.weight", Type.F32, (HIDDEN,)
    shared = 2 * FF_EXPERT
    for i in range(layers):
        block: list[tuple[str, Type, tuple[int, ...]]] = [
            ("attn_norm", Type.F32, (HIDDEN,)),
            ("ffn_norm", Type.F32, (HIDDEN,)),
            ("attn_kv_a_norm", Type.F32, (RANK,)),
            ("attn_q", Type.Q4_K, (HEADS * (NOPE + ROPE), HIDDEN)),
            ("attn_kv_a_mqa", Type.Q8_0, (RANK + ROPE, HIDDEN)),
            ("attn_k_b", Type.Q8_0, (HEADS, RANK, NOPE)),
            ("attn_v_b", Type.Q8_0, (HEADS, VALUE, RANK)),
            ("attn_output", Type.Q4_K, (HIDDEN, HEADS * VALUE)),
        ]
        if i == 0:
            block += [
                ("ffn_gate", Type.Q4_K, (FF, HIDDEN)),
                ("ffn_up", Type.Q4_K, (FF, HIDDEN)),
                ("ffn_down", Type.Q5_0, (HIDDEN, FF)),
            ]
        else:
            block += [
                ("ffn_gate_inp", Type.F32, (experts, HIDDEN)),
                ("ffn_gate_exps", Type.Q4_K, (experts, FF_EXPERT, HIDDEN)),
                ("ffn_up_exps", Type.Q4_K, (experts, FF_EXPERT, HIDDEN)),
                ("ffn_down_exps", Type.Q5_0, (experts, HIDDEN, FF_EXPERT)),
                ("ffn_gate_shexp", Type.Q4_K, (shared, HIDDEN)),
                ("ffn_up_shexp", Type.Q4_K, (shared, HIDDEN)),
                ("ffn_down_shexp", Type.Q4_K, (HIDDEN, shared)),
            ]
        for name, kind, shape in block:
            yield f"blk.{i}.{name}.weight", kind, shape


def add_metadata(writer: gguf.GGUFWriter, layers: int, experts: int) -> None:
    key = "deepseek2."
    for name, value in {
        "block_count": layers,
        "context_length": 163840,
        "embedding_length": HIDDEN,
        "feed_forward_length": FF,
        "attention.head_count": HEADS,
        "attention.head_count_kv": 1,
        "leading_dense_block_count": 1,
        "vocab_size": VOCABULARY,
        "attention.kv_lora_rank": RANK,
        "attention.key_length": RANK + ROPE,
        "attention.value_length": RANK,
        "attention.key_length_mla": NOPE + ROPE,
        "attention.value_length_mla": VALUE,
        "expert_feed_forward_length": FF_EXPERT,
        "expert_count": experts,
        "expert_used_count": 6,
        "expert_shared_count": 2,
        "expert_gating_func": 1,
        "rope.dimension_count": ROPE,
    }.items():
        writer.add_uint32(key + name, value)
    writer.add_float32(key + "attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_float32(key + "rope.freq_base", 10000.0)
    writer.add_float32(key + "expert_weights_scale", 1.0)
    writer.add_name(f"random V2-Lite geometry, {experts} experts")
    # Bytes as words, and words that nothing is made of.
    alphabet = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in alphabet]
    words = [chr(byte) for byte in alphabet] + [chr(256 + i) for i in range(len(others))]
    words.append(words[0] + words[1])
    words += [f"<word {i}>" for i in range(VOCABULARY - len(words))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("deepseek-llm")
    writer.add_token_list(words)
    writer.add_token_types([1] * 257 + [4] * (VOCABULARY - 257))
    writer.add_token_merges([f"{words[0]} {words[1]}"])
    writer.add_eos_token_id(VOCABULARY - 1)


def write(out: Path, layers: int, experts: int) -> None:
    writer = gguf.GGUFWriter(out, "deepseek2")
    add_metadata(writer, layers, experts)
    wanted = list(tensors(layers, experts))
    tiles = {kind: tile(kind) for kind in BLOCKS}
    sizes = []
    for name, kind, shape in wanted:
        size = int(np.prod(shape))
        if kind != Type.F32:
            elements, nbytes = BLOCKS[kind]
            size = size // elements * nbytes
            shape = (*shape[:-1], shape[-1] // elements * nbytes)
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), size, raw_dtype=kind)
        else:
            size *= 4
            writer.add_tensor_info(name, shape, np.dtype(np.float32), size)
        sizes.append(size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with out.open("ab") as file:
        file.write(bytes(-file.tell() % 32))
        for (name, kind, shape), size in zip(wanted, sizes, strict=True):
            if kind == Type.F32:
                data = RNG.standard_normal(shape, np.float32) * 0.02
                file.write(np.ones_like(data) if "norm" in name else data)
            else:
                # Layers that were alike would turn all tokens into one.
                blocks = np.roll(tiles[kind], int(RNG.integers(TILE)) * BLOCKS[kind][1])
                for start in range(0, size, len(blocks)):
                    file.write(blocks[: size - start])
            file.write(bytes(-size % 32))
            file.flush()
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--experts", type=int, default=440)
    args = parser.parse_args()
    write(args.out, args.layers, args.experts)


if __name__ == "__main__":
    main()

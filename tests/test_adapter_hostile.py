"""Adapters that must be refused: damaged and hostile files, and those of other models."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from adapter_cases import ATTENTION, EVERYTHING, EXPERTS, Case, base_of
from ggufs import tensor, write

from localds.adapters import AdapterError, read_adapter, read_gguf_adapter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


KEY = "base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight"


def without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.pop(key)


def with_(key: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({key: change(tensors.get(KEY))})


HOSTILE_TENSORS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a part is missing": (without(KEY), r"has parts \['b'\] and needs"),
    "all is missing": (lambda tensors: tensors.clear(), "no adapted matrix"),
    "another rank": (with_(KEY, lambda a: a[:2]), r"has shape \(2, 96\); rank 3"),
    "another width": (with_(KEY, lambda a: a[:, :-1]), r"has shape \(3, 95\).*another model"),
    "three dimensions": (with_(KEY, lambda a: a[None]), r"has shape \(1, 3, 96\)"),
    "no number": (with_(KEY, lambda a: a * np.float32(np.nan)), "no numbers"),
    "an infinite number": (with_(KEY, lambda a: a * np.float32(np.inf)), "no numbers"),
    "integers": (with_(KEY, lambda a: a.astype(np.int32)), "is I32; adapters are"),
    "a layer too many": (
        with_(KEY.replace("layers.1.", "layers.3."), lambda a: a),
        "has parts",
    ),
    "another name": (with_("unrelated", lambda a: a), "'unrelated' is none of"),
    "a bias": (with_(KEY.replace("A.weight", "B.bias"), lambda a: a), "is none of"),
    "an embedding": (
        with_("base_model.model.model.embed_tokens.lora_embedding_A", lambda a: a),
        "is none of",
    ),
    "magnitudes without DoRA": (
        with_(KEY.replace("A.weight", "magnitude_vector"), lambda a: a[0]),
        r"has parts \['a', 'b', 'm'\]",
    ),
}


@pytest.mark.parametrize("name", HOSTILE_TENSORS)
def test_hostile_tensors(tmp_path: Path, name: str) -> None:
    edit, message = HOSTILE_TENSORS[name]
    case = Case("v3", modules=ATTENTION)
    base = base_of(tmp_path, case)
    tensors: dict[str, Any] = case.tensors()
    edit(tensors)
    with pytest.raises(AdapterError, match=message) as raised:
        read_adapter(case.folder(tmp_path / "adapter", tensors), base)
    assert str(tmp_path / "adapter") in str(raised.value)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Case("kimi-k2"), "12|expert 8|another model"),
        (Case("moonlight"), "has not; it belongs to another model|another model"),
        (Case("mixtral"), "adapts model.layers|another model|which experts have not"),
    ],
)
def test_adapters_of_other_models(tmp_path: Path, other: Case, message: str) -> None:
    base = base_of(tmp_path, Case("v3"))
    with pytest.raises(AdapterError, match=message):
        read_adapter(other.folder(tmp_path / "adapter"), base)


def test_more_layers_than_the_model_has(tmp_path: Path) -> None:
    case = Case("v3", modules=ATTENTION)
    base = base_of(tmp_path, case)
    tensors = {name.replace("layers.2.", "layers.3."): a for name, a in case.tensors().items()}
    with pytest.raises(AdapterError, match=r"it adapts layer 3, and .* has 3 \(from 0 on\)"):
        read_adapter(case.folder(tmp_path / "adapter", tensors), base)


def test_some_experts_only(tmp_path: Path) -> None:
    case = Case("v3", modules=EXPERTS)
    base = base_of(tmp_path, case)
    tensors = {name: a for name, a in case.tensors().items() if "experts.5." not in name}
    with pytest.raises(AdapterError, match="no pair for expert 5"):
        read_adapter(case.folder(tmp_path / "adapter", tensors), base)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"r": 0}, "r is 0"),
        ({"r": "3"}, "r is '3'"),
        ({"r": 2000}, "rank is 2000"),
        ({"r": 4}, "rank 4 on"),
        ({"lora_alpha": "many"}, "lora_alpha is 'many'"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": 0}, "alpha is 0"),
        ({"lora_alpha": 10**400}, "too large"),
        ({"lora_alpha": 1e-323, "r": 64}, "too small"),
        ({"use_dora": "yes"}, "use_dora is 'yes'"),
        ({"use_dora": True}, "needs .'a', 'b', 'm'."),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the model's own weights"),
        ({"rank_pattern": [1]}, r"rank_pattern is \[1\]"),
        ({"alpha_pattern": {"(a+)+": 1}}, "too complicated"),
        ({"alpha_pattern": {"(": 1}}, "no regular expression"),
        ({"alpha_pattern": {"o_proj": None}}, "alpha_pattern of 'o_proj' is None"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3"),
    ],
)
def test_hostile_configurations(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    case = Case("v3", modules=ATTENTION)
    base = base_of(tmp_path, case)
    with pytest.raises(AdapterError, match=message):
        read_adapter(case.folder(tmp_path / "adapter", **changes), base)


@pytest.mark.parametrize("text", ["", "[]", "{", "3", "[" * 100_000, "\xff"])
def test_configurations_that_are_none(tmp_path: Path, text: str) -> None:
    case = Case("v3", modules=ATTENTION)
    base = base_of(tmp_path, case)
    folder = case.folder(tmp_path / "adapter")
    (folder / "adapter_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        read_adapter(folder, base)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"there is no adapter_config\.json"):
        read_adapter(folder, base)


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    case = Case("v3", modules=ATTENTION)
    base = base_of(tmp_path, case)
    folder = case.folder(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickled, and opening it can run code"):
        read_adapter(folder, base)
    with pytest.raises(AdapterError, match="it is no adapter"):
        read_adapter(folder / "adapter_model.bin", base)
    with pytest.raises(AdapterError, match="there is no such adapter"):
        read_adapter(folder / "absent", base)


def damaged(raw: bytes) -> dict[str, bytes]:
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    data = raw[8 + length :]

    def packed(changed: Any) -> bytes:
        text = json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + data

    name, entry = next((name, header[name]) for name in header if name != "__metadata__")
    return {
        "empty": b"",
        "short": raw[:6],
        "header cut": raw[: length // 2],
        "data cut": raw[:-1],
        "data added": raw + b"\0",
        "length": struct.pack("<Q", 1 << 60) + raw[8:],
        "no JSON": raw[:8] + b"x" * length + data,
        "list": packed([1]),
        "entry": packed(header | {name: 3}),
        "negative": packed(header | {name: entry | {"shape": [-1, 3]}}),
        "huge": packed(header | {name: entry | {"shape": [1 << 40, 1 << 40]}}),
        "overlap": packed(header | {name: entry | {"data_offsets": [4, 4 + 8]}}),
        "metadata": packed(header | {"__metadata__": 3}),
    }


def test_damaged_files(tmp_path: Path) -> None:
    case = Case("v3", modules=ATTENTION)
    base = base_of(tmp_path, case)
    folder = case.folder(tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    for name, raw in damaged(path.read_bytes()).items():
        path.write_bytes(raw)
        with pytest.raises(AdapterError, match=r"adapter_model\.safetensors"):
            read_adapter(folder, base)
            pytest.fail(name)


GGUF_KEYS = {
    "general.type": "adapter",
    "general.architecture": "deepseek2",
    "adapter.type": "lora",
    "adapter.lora.alpha": 4.0,
}
A, B = (np.ones(shape, np.float32) for shape in ((2, 96), (64, 2)))
PAIR = {"blk.1.attn_output.weight.lora_a": A, "blk.1.attn_output.weight.lora_b": B}


@pytest.mark.parametrize(
    ("keys", "tensors", "message"),
    [
        ({"general.type": "model"}, PAIR, "general.type is 'model'"),
        ({"adapter.type": "control_vector"}, PAIR, "adapter.type 'control_vector'"),
        ({"general.architecture": "llama"}, PAIR, "architecture 'llama'.*another model"),
        ({"adapter.lora.alpha": float("nan")}, PAIR, "alpha.*nan"),
        ({"adapter.lora.alpha": -1.0}, PAIR, "alpha is -1"),
        ({}, {}, "no adapted matrix"),
        ({}, {"blk.1.attn_output.weight.lora_a": A}, "only its lora_a"),
        ({}, PAIR | {"blk.1.attn_output.weight.lora_b": B[:, :1]}, "ranks 2 in lora_a and 1"),
        ({}, PAIR | {"blk.1.attn_output.weight.lora_b": B[:-1]}, "has shape.*another model"),
        ({}, PAIR | {"blk.1.attn_output.weight.lora_a": A * np.float32(np.inf)}, "no numbers"),
        ({}, PAIR | {"blk.1.attn_output.weight.lora_a": A[None]}, "pairs have 2 dimensions"),
        ({}, PAIR | {"blk.1.attn_norm.weight": A[0]}, "attn_norm.* is none of a pair"),
        ({}, {n.replace("blk.1", "blk.9"): a for n, a in PAIR.items()}, "layer 9"),
        ({}, {n.replace("attn_output", "attn_k_b"): a for n, a in PAIR.items()}, "attn_k_b"),
        ({}, {n.replace("attn_output", "ffn_up_exps"): a for n, a in PAIR.items()}, "shape"),
    ],
)
def test_hostile_gguf_adapters(
    tmp_path: Path, keys: dict[str, Any], tensors: dict[str, Any], message: str
) -> None:
    base = base_of(tmp_path, Case("v3"))
    specs = [tensor(name, array) for name, array in tensors.items()]
    path = write(tmp_path / "adapter.gguf", GGUF_KEYS | keys, specs)
    with pytest.raises(AdapterError, match=message) as raised:
        read_adapter(path, base)
    assert "adapter.gguf" in str(raised.value)


def test_an_adapter_without_alpha_counts_once(tmp_path: Path) -> None:
    """As in llama.cpp, which takes 0 for absent."""
    base = base_of(tmp_path, Case("v3"))
    for keys in ({"adapter.lora.alpha": 0.0}, {}):
        path = tmp_path / "adapter.gguf"
        metadata = {k: v for k, v in GGUF_KEYS.items() if k != "adapter.lora.alpha"} | keys
        write(path, metadata, [tensor(name, array) for name, array in PAIR.items()])
        adapter = read_gguf_adapter(path, base)
        assert adapter.scale == 1
        np.testing.assert_array_equal(adapter.tree["blk.1.attn_output"]["b"], B)


def test_chat_tells_whose_adapter_it_is(tmp_path: Path) -> None:
    plain = Case("v3").gguf(tmp_path / "plain.gguf")
    folder = Case("v2-lite", modules=EVERYTHING).folder(tmp_path / "other")
    command = [sys.executable, "-P", "-m", "localds", "chat", str(plain), "-p", "a", "--raw"]
    done = subprocess.run(
        [*command, "--device", "cpu", "--adapter", str(folder)],
        capture_output=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 1
    assert b"it belongs to another model" in done.stderr
    assert b"Traceback" not in done.stderr

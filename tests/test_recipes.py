"""Recipes, rules for single tensors, sizes to meet, and the plan."""

from __future__ import annotations

import itertools
import zlib
from pathlib import Path

import numpy as np
import pytest

from convert.fit import Option, best_choices, convex
from convert.plan import parts, plan_table
from convert.presets import PRESETS
from convert.recipes import choose_types, file_type
from convert.source import Source, Target
from localds.gguf import GGMLType
from localds.gguf.write import TensorInfo, lay_out

LAYERS, HIDDEN, EXPERTS = 8, 512, 16


def target(name: str, *shape: int) -> Target:
    def read(
        matrix: int, start: int, stop: int
    ) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        rng = np.random.default_rng(zlib.crc32(name.encode()) + matrix)
        return rng.standard_normal((stop - start, shape[-1]), np.float32)

    return Target(name, shape, "BF16", 2 * int(np.prod(shape)), read)


@pytest.fixture(scope="module")
def source() -> Source:
    targets = [target("token_embd.weight", 300, HIDDEN), target("output_norm.weight", HIDDEN)]
    targets.append(target("output.weight", 300, HIDDEN))
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        targets += [
            target(block + "attn_norm.weight", HIDDEN),
            target(block + "attn_kv_a_mqa.weight", 96, HIDDEN),
            target(block + "attn_k_b.weight", 4, 64, 32),
            target(block + "attn_output.weight", HIDDEN, 256),
            target(block + "ffn_gate_inp.weight", EXPERTS, HIDDEN),
            target(block + "ffn_down_exps.weight", EXPERTS, HIDDEN, 256),
            target(block + "ffn_up_exps.weight", EXPERTS, 256, HIDDEN),
            target(block + "ffn_down_shexp.weight", HIDDEN, 256),
        ]
    metadata = {"deepseek2.block_count": LAYERS, "deepseek2.expert_count": EXPERTS}
    return Source(Path("model"), "deepseek2", metadata, targets, [])


def chosen(source: Source, recipe: str, *keep: str) -> dict[str, str]:
    types = choose_types(source, recipe, keep, None)
    return {t.name: kind.name for t, kind in zip(source.targets, types, strict=True)}


def test_q4_k_m(source: Source) -> None:
    """The table of llama-quantize for 8 layers: the first, the last, every third between."""
    types = chosen(source, "q4_k_m")
    down = [types[f"blk.{layer}.ffn_down_exps.weight"] for layer in range(LAYERS)]
    assert [layer for layer, kind in enumerate(down) if kind == "Q6_K"] == [0, 3, 6, 7]
    assert types["output.weight"] == "Q6_K"
    assert {types["token_embd.weight"], types["blk.1.ffn_up_exps.weight"]} == {"Q4_K"}
    assert types["blk.1.attn_k_b.weight"] == "Q5_0"
    assert types["blk.1.ffn_gate_inp.weight"] == types["blk.1.attn_norm.weight"] == "F32"


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_fits_the_rows(source: Source, preset: str) -> None:
    for found, kind in zip(source.targets, choose_types(source, preset, [], None), strict=True):
        assert found.columns % kind.block_elements == 0


def test_the_last_rule_wins(source: Source) -> None:
    types = chosen(source, "Q4_K_M", "ffn_.*=Q2_K", r"blk\.0\.ffn_up=Q8_0")
    assert types["blk.0.ffn_up_exps.weight"] == "Q8_0"
    assert types["blk.1.ffn_up_exps.weight"] == types["blk.0.ffn_down_exps.weight"] == "Q2_K"
    assert types["blk.0.ffn_gate_inp.weight"] == "F32"


@pytest.mark.parametrize(
    ("recipe", "keep", "message"),
    [
        ("Q9_Z", [], "'Q9_Z' is not known; choose one of F32"),
        ("Q4_K_M", ["attn_"], "expected REGEX=TYPE"),
        ("Q4_K_M", ["attn_=Q9"], "expected REGEX=TYPE"),
        ("Q4_K_M", ["attn_(=Q8_0"], "no regular expression"),
        ("Q4_K_M", ["nothing=Q8_0"], "matches no tensor"),
        ("Q4_K_M", ["attn_norm=Q8_0"], "matches only norms"),
        ("Q4_K_M", ["attn_k_b=Q4_K"], r"attn_k_b\.weight have 32 elements.*256 of Q4_K"),
        ("fit:1KiB", [], "the smallest file of this model has"),
        ("fit:much", [], "size 'much' is not understood"),
    ],
)
def test_refusals(source: Source, recipe: str, keep: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_types(source, recipe, keep, None)


@pytest.mark.parametrize("size", ["14MiB", "20MiB", "30MiB", "1GiB"])
def test_fit_meets_the_size(source: Source, size: str) -> None:
    types = choose_types(source, f"fit:{size}", [], None)
    infos = [TensorInfo(t.name, t.shape, k) for t, k in zip(source.targets, types, strict=True)]
    written = lay_out(dict(source.metadata), infos).size
    limit = int(size[:-3]) * (1 << (20 if size.endswith("MiB") else 30))
    assert written <= limit
    # Room that is left is less than one more step of the largest tensors takes.
    assert size == "1GiB" or written > limit - (1 << 20)


def test_fit_keeps_what_every_token_uses_high(source: Source) -> None:
    kinds = chosen(source, "fit:16MiB")
    bits = {kind.name: 8 * kind.block_bytes / kind.block_elements for kind in GGMLType}
    experts = [bits[kind] for name, kind in kinds.items() if "_exps" in name]
    trunk = [bits[kind] for name, kind in kinds.items() if "attn_kv" in name or "_shexp" in name]
    assert max(experts) < min(trunk)


def test_fit_respects_rules(source: Source) -> None:
    kinds = chosen(source, "fit:28MiB", "ffn_up_exps=Q8_0")
    assert {kind for name, kind in kinds.items() if "ffn_up_exps" in name} == {"Q8_0"}


def test_best_choices_are_near_the_optimum() -> None:
    """Against all combinations: never better, and worse by less than the largest single step."""
    rng = np.random.default_rng(3)
    for _ in range(50):
        options = [
            convex(
                [
                    Option(GGMLType.F32, int(n), 100.0 / n * rng.random())
                    for n in rng.integers(1, 60, 6)
                ]
            )
            for _ in range(4)
        ]
        room = int(rng.integers(0, 120))
        start = sum(choices[0].nbytes for choices in options)
        best = min(
            sum(option.error for option in combination)
            for combination in itertools.product(*options)
            if sum(option.nbytes for option in combination) <= start + room
        )
        found = best_choices(options, room)
        assert sum(option.nbytes for option in found) <= start + room
        largest = max(
            (a.error - b.error for choices in options for a, b in itertools.pairwise(choices)),
            default=0,
        )
        error = sum(option.error for option in found)
        assert best - 1e-9 <= error <= best + largest


def test_convex_drops_what_never_pays() -> None:
    options = [
        Option(GGMLType.Q2_K, 10, 8.0),
        Option(GGMLType.Q3_K, 20, 7.5),
        Option(GGMLType.Q4_K, 30, 1.0),
    ]
    assert [option.kind for option in convex(options)] == [GGMLType.Q2_K, GGMLType.Q4_K]


def test_file_types() -> None:
    assert file_type("q4_k", []) == 15
    assert file_type("fit:1GiB", [GGMLType.F32, GGMLType.Q3_K, GGMLType.Q3_K, GGMLType.Q6_K]) == 11


def test_plan(source: Source) -> None:
    types = choose_types(source, "Q8_0", [], None)
    found = {part.name: part for part in parts(source.targets, types)}
    assert found["routed experts"].tensors == 2 * LAYERS
    assert found["routed experts"].bits == 8.5
    assert found["attention"].tensors == 3 * LAYERS
    assert found["routers and norms"].bits == 32
    assert found["total"].elements == sum(t.elements for t in source.targets)
    assert "routed experts" in plan_table(source.targets, types)

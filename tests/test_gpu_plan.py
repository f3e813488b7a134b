"""What lies on a GPU, against sizes computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from gpu_cases import (
    EXPERT,
    F32,
    GIB,
    MIB,
    SPEEDS,
    V2_LITE,
    V3,
    card,
    gguf_of,
    lite,
    on_gpu,
    same,
    v2_lite,
    v3,
)

from localds.gguf import GGMLType
from localds.memory.gpu_plan import (
    check_gpu_options,
    host_plan,
    place_beside_gpu,
    vram_bytes,
)
from localds.memory.gpu_sizes import WRITTEN_BYTES, device_sizes
from localds.memory.latents import attention_scratch
from localds.memory.placement import slot_bytes
from localds.memory.plan import ROUTED, BudgetError, make_plan
from localds.ops.mlx_device import Gpu

# V2-Lite, bytes by hand. Q4_K has 144 bytes for 256 values, Q8_0 has 34 for 32.
LITE_TRUNK = (
    2 * 2048 * 102400 * 144 // 256
    + 27 * 2048 * 4
    + 27 * (2048 * 3072 + 2048 * 2048) * 144 // 256
    + 27 * (2048 * 576 + 2 * 128 * 512 * 16) * 34 // 32
    + 2 * 2048 * 10944 * 144 // 256
    + 10944 * 2048 * 34 // 32
    + 26 * 2048 * 64 * 4
    + 26 * 2 * (2 * 2048 * 1408 * 144 // 256 + 1408 * 2048 * 34 // 32)
)
WRITTEN = 2 * 1408 * 2048  # an expert's matrix in float16
DENSE_WRITTEN = 2 * 2048 * 10944
PIECE = 128 * MIB // EXPERT
STAGING = 2 * PIECE * EXPERT


def lite_scratch(stack: int, context: int = 8192) -> int:
    """Attention and feed-forward do not meet; the larger counts, and two stacks written out."""
    attention = attention_scratch(16, 576, 1024, context, "f16") + 1024 * 4 * (2 * 2048 + 16 * 320)
    experts = 1024 * 4 * (2 * 2048 + 6 * 3 * (2048 + 1408))
    written = 2 * max(stack * WRITTEN, DENSE_WRITTEN)
    return max(attention, experts) + written + 102400 * 4 + 300_000_000


def test_all_of_a_model_fits_in_exactly_what_it_takes() -> None:
    gguf, plan = lite()
    total = LITE_TRUNK + 8192 * 27 * 576 * 2 + lite_scratch(64) + 26 * 64 * EXPERT
    placement = on_gpu(gguf, V2_LITE, plan, card(24 * GIB), total, speeds=SPEEDS)
    assert placement.resident
    assert placement.total == total
    assert placement.weights == LITE_TRUNK == plan.trunk
    assert placement.cache == plan.cache
    assert placement.pool == plan.parts[ROUTED]
    assert placement.slots == (64,) * 26
    assert placement.staging == 0
    assert placement.stream_from is None
    assert not on_gpu(gguf, V2_LITE, plan, card(24 * GIB), total - 1).resident


def test_a_short_context_takes_what_the_experts_take() -> None:
    gguf = v2_lite()
    plan = make_plan(gguf, V2_LITE, 1024)
    experts = 1024 * 4 * (2 * 2048 + 6 * 3 * (2048 + 1408))
    assert attention_scratch(16, 576, 1024, 1024, "f16") + 1024 * 4 * (4096 + 5120) < experts
    placement = on_gpu(gguf, V2_LITE, plan, card(24 * GIB))
    assert placement.scratch == experts + 2 * 64 * WRITTEN + 102400 * 4 + 300_000_000
    few = on_gpu(gguf, V2_LITE, plan, card(24 * GIB), chunk=256)
    assert placement.scratch - few.scratch == experts * 3 // 4


@pytest.mark.parametrize("budget", [5 * GIB, 8 * GIB, 8 * GIB + 777_777_777])
def test_experts_take_what_is_left(budget: int) -> None:
    gguf, plan = lite()
    placement = on_gpu(gguf, V2_LITE, plan, card(24 * GIB), budget)
    # One more in all layers takes 26 experts, and two more matrices to be written out.
    fixed = LITE_TRUNK + plan.cache + lite_scratch(0) - 2 * DENSE_WRITTEN + STAGING
    count = (budget - fixed) // (26 * EXPERT + 2 * WRITTEN)
    if count < PIECE:  # then a piece is the largest stack
        count = (budget - fixed - 2 * PIECE * WRITTEN) // (26 * EXPERT)
    written = 2 * max(PIECE, count + 1) * WRITTEN
    more = (budget - fixed - written - 26 * count * EXPERT) // EXPERT
    assert 0 < more < 26
    assert placement.slots == (count + 1,) * more + (count,) * (26 - more)
    assert placement.scratch == lite_scratch(max(PIECE, count + 1))
    assert placement.staging == STAGING
    assert budget - EXPERT < placement.total <= budget


def test_v3_on_24_gib() -> None:
    gguf = v3()
    plan = make_plan(gguf, V3, 8192)
    expert = 3 * 7168 * 2048 * 144 // 256
    attention_values = 7168 * 1536 + 1536 * 24576 + 7168 * 576 + 512 * 128 * 128 + 16384 * 7168
    trunk = (
        2 * 7168 * 129280 * 144 // 256
        + 61 * (7168 * 4 + attention_values * 144 // 256 + 128 * 512 * 128 * 34 // 32)
        + 3 * 3 * 7168 * 18432 * 144 // 256
        + 58 * (7168 * 256 * 4 + expert)
    )
    placement = on_gpu(gguf, V3, plan, card(24 * GIB), speeds=SPEEDS, ram=64 * GIB)
    budget = 24 * GIB - int(0.06 * 24 * GIB)
    piece = 128 * MIB // expert
    attention = attention_scratch(128, 576, 1024, 8192, "f16") + 1024 * 4 * (2 * 7168 + 128 * 320)
    experts = 1024 * 4 * (2 * 7168 + 8 * 3 * (7168 + 2048))
    # The largest matrices are the dense layer's; so many experts are written out in no more.
    written = 2 * 2 * 7168 * 18432
    scratch = max(attention, experts) + written + 129280 * 4 + 300_000_000
    left = budget - trunk - 8192 * 61 * 1152 - scratch - 2 * piece * expert
    count, rest = divmod(left // expert, 58)
    assert 2 * (count + 1) * 7168 * 2048 * 2 <= written
    assert placement.budget == budget
    assert placement.slots == (count + 1,) * rest + (count,) * (58 - rest)
    assert placement.weights == trunk
    assert placement.scratch == scratch
    # Most experts come from disk for the GPU as well as for the CPU.
    assert placement.stream_from is None
    host = place_beside_gpu(gguf, V3, plan, placement, 64 * GIB)
    assert not host.resident
    assert host.slots_total == 58 * 256
    fixed = plan.runtime + placement.staging
    assert host.slots == (64 * GIB - fixed) // slot_bytes(gguf, V3)
    assert host.total <= 64 * GIB


def test_of_large_stacks_no_more_than_slices_are_written_out() -> None:
    gguf = v3()
    plan = make_plan(gguf, V3, 1024)
    placement = on_gpu(gguf, V3, plan, card(140 * GIB))
    assert 2 * placement.slots[0] * 7168 * 2048 * 2 > 2 * WRITTEN_BYTES
    attention = attention_scratch(128, 576, 1024, 1024, "f16") + 1024 * 4 * (2 * 7168 + 128 * 320)
    experts = 1024 * 4 * (2 * 7168 + 8 * 3 * (7168 + 2048))
    assert placement.scratch == max(attention, experts) + WRITTEN_BYTES + 129280 * 4 + 300_000_000


@pytest.mark.parametrize(
    ("kind", "name", "cuda", "metal", "portable"),
    [
        (GGMLType.Q6_K, "blk.0.attn_q", 2, 2, 4),
        (GGMLType.BF16, "blk.0.attn_q", 4, 4, 4),
        (GGMLType.F16, "blk.0.attn_q", 0, 4, 4),
        (F32, "blk.0.attn_q", 0, 0, 0),
        (GGMLType.Q6_K, "output", 0, 0, 4),
        (GGMLType.BF16, "output", 0, 4, 4),
    ],
)
def test_bytes_of_a_value_that_is_written_out(
    kind: GGMLType, name: str, cuda: int, metal: int, portable: int
) -> None:
    """The output has to multiply one row, which our kernels do with blocks as they lie."""
    gguf = gguf_of([("token_embd", F32, (512, 64)), (name, kind, (512, 64))])
    geometry = replace(V2_LITE, layers=1, experts=0)
    gpus = {
        card(GIB): cuda,
        card(GIB, unified=True): metal,
        Gpu("a stand-in", "cpu", GIB, GIB, unified=False): portable,
    }
    for gpu, itemsize in gpus.items():
        sizes = device_sizes(gguf, geometry, gpu, same)
        assert sizes.trunk_written == 512 * 64 * itemsize
        # MLX's own operations, of which there are none here for CUDA, write no slices.
        sliced = gpu.kind == "cuda" or itemsize in (0, 2)
        assert sizes.most_written == (WRITTEN_BYTES if sliced else None)


def test_what_is_free_is_taken_less_a_reserve() -> None:
    gguf, plan = lite()
    assert on_gpu(gguf, V2_LITE, plan, card(8 * GIB)).budget == 8 * GIB - 512 * MIB
    assert on_gpu(gguf, V2_LITE, plan, card(100 * GIB, 50 * GIB)).budget == 44 * GIB
    unified = on_gpu(gguf, V2_LITE, plan, card(40 * GIB, unified=True))
    assert unified.budget == 40 * GIB - int(0.12 * 40 * GIB)


def test_more_than_the_card_has_is_refused() -> None:
    gguf, plan = lite()
    gpu = card(8 * GIB, 6 * GIB)
    with pytest.raises(BudgetError, match="vram is 9 GiB, more than a card has: 6 GiB of 8 GiB"):
        on_gpu(gguf, V2_LITE, plan, gpu, 9 * GIB)
    with pytest.raises(BudgetError, match="7 GiB, more than a card has to give: 6 GiB of 8 GiB"):
        on_gpu(gguf, V2_LITE, plan, gpu, 7 * GIB)
    assert on_gpu(gguf, V2_LITE, plan, gpu, 6 * GIB).budget == 6 * GIB


def test_below_the_floor_it_says_what_would_fit() -> None:
    gguf, plan = lite()
    floor = LITE_TRUNK + plan.cache + lite_scratch(PIECE) + STAGING
    gpu = card(24 * GIB)
    assert on_gpu(gguf, V2_LITE, plan, gpu, floor).slots == (0,) * 26
    with pytest.raises(BudgetError, match="no experts there") as refused:
        on_gpu(gguf, V2_LITE, plan, gpu, floor - 400 * MIB)
    context = int(str(refused.value).split("--context ")[1].rstrip(")"))
    assert 0 < context < 8192
    on_gpu(gguf, V2_LITE, make_plan(gguf, V2_LITE, context), gpu, floor - 400 * MIB)
    with pytest.raises(BudgetError):
        longer = make_plan(gguf, V2_LITE, context + 1)
        on_gpu(gguf, V2_LITE, longer, gpu, floor - 400 * MIB)
    with pytest.raises(BudgetError, match=r"even a context of 1 token needs .* with --vram"):
        on_gpu(gguf, V2_LITE, plan, gpu, LITE_TRUNK)


def test_no_experts_on_the_device() -> None:
    gguf, plan = lite()
    placement = on_gpu(gguf, V2_LITE, plan, card(24 * GIB), cpu_moe=True)
    assert placement.slots == (0,) * 26
    assert placement.pool == 0
    assert not placement.resident
    host = host_plan(plan, gguf, V2_LITE, placement.slots, placement.staging)
    assert host.parts == {ROUTED: 26 * 64 * EXPERT}
    assert host.trunk == host.cache == 0
    assert host.runtime == plan.runtime + STAGING


def test_the_first_layers_without_experts() -> None:
    gguf, plan = lite()
    gpu = card(24 * GIB)
    placement = on_gpu(gguf, V2_LITE, plan, gpu, n_cpu_moe=10)
    # The first block has no experts, so that nine layers of the ten have.
    assert placement.slots == (0,) * 9 + (64,) * 17
    host = host_plan(plan, gguf, V2_LITE, placement.slots, placement.staging)
    assert host.parts == {ROUTED: 9 * 64 * EXPERT}
    assert host.on_device == frozenset(range(10, 27))
    assert on_gpu(gguf, V2_LITE, plan, gpu, n_cpu_moe=0).resident
    assert on_gpu(gguf, V2_LITE, plan, gpu, n_cpu_moe=99).slots == (0,) * 26


def test_too_few_layers_without_experts_are_refused_with_the_number_that_fits() -> None:
    gguf, plan = lite()
    gpu = card(24 * GIB)
    fixed = LITE_TRUNK + plan.cache + lite_scratch(64) + STAGING
    # Layers are whole or not at all: ten of 26 are there, of 27 blocks 17 are without.
    budget = fixed + 10 * 64 * EXPERT
    assert sum(on_gpu(gguf, V2_LITE, plan, gpu, budget, n_cpu_moe=17).slots) == 640
    with pytest.raises(BudgetError, match=r"17 would fit \(--n-cpu-moe 17\)"):
        on_gpu(gguf, V2_LITE, plan, gpu, budget, n_cpu_moe=3)
    with pytest.raises(BudgetError, match=r"18 would fit"):
        on_gpu(gguf, V2_LITE, plan, gpu, budget - 1, n_cpu_moe=17)
    with pytest.raises(BudgetError, match="no experts there"):
        on_gpu(gguf, V2_LITE, plan, gpu, LITE_TRUNK, n_cpu_moe=3)


def test_options_that_exclude_each_other() -> None:
    gguf, plan = lite()
    with pytest.raises(ValueError, match="give one of them"):
        on_gpu(gguf, V2_LITE, plan, card(24 * GIB), cpu_moe=True, n_cpu_moe=3)
    with pytest.raises(ValueError, match="n_cpu_moe is -1; it must be at least 0"):
        on_gpu(gguf, V2_LITE, plan, card(24 * GIB), n_cpu_moe=-1)
    check_gpu_options(True, 5, False, 0)
    for options, name in (((5, False, None), "vram"), ((None, True, None), "cpu_moe")):
        with pytest.raises(ValueError, match=f"^{name} .*the device is the CPU; leave it out"):
            check_gpu_options(False, *options)
    with pytest.raises(ValueError, match=r"^n_cpu_moe .*the device is the CPU"):
        check_gpu_options(False, None, False, 0)
    assert vram_bytes("2GiB") == 2 * GIB
    assert vram_bytes(7) == 7
    assert vram_bytes(None) is None


def test_slots_of_a_model_that_is_there_stay() -> None:
    gguf, plan = lite()
    gpu = card(24 * GIB)
    first = on_gpu(gguf, V2_LITE, plan, gpu, 6 * GIB)
    shorter = make_plan(gguf, V2_LITE, 4096)
    again = on_gpu(gguf, V2_LITE, shorter, gpu, 6 * GIB, slots=first.slots)
    assert again.slots == first.slots
    assert again.total < first.total
    with pytest.raises(BudgetError, match=r"a context of 8[0-9]{3} tokens would fit"):
        longer = make_plan(gguf, V2_LITE, 50_000)
        on_gpu(gguf, V2_LITE, longer, gpu, 6 * GIB, slots=first.slots)


def test_what_the_device_keeps_otherwise_counts_as_it_lies_there() -> None:
    gguf, plan = lite()

    def twice(kind: GGMLType, nbytes: int) -> int:
        return nbytes if kind is GGMLType.F32 else 2 * nbytes

    placement = on_gpu(gguf, V2_LITE, plan, card(64 * GIB), device_bytes=twice)
    floats = 27 * 2048 * 4 + 26 * 2048 * 64 * 4
    assert placement.weights == 2 * LITE_TRUNK - floats
    assert placement.expert_bytes == (2 * EXPERT,) * 26
    # Nothing is written out that is in a form to be multiplied in.
    assert placement.scratch == lite_scratch(64) - 2 * 64 * WRITTEN


def test_a_tied_output_is_kept_and_read_once() -> None:
    gguf, plan = lite()
    table = 2048 * 102400 * 144 // 256
    whole = on_gpu(gguf, V2_LITE, plan, card(24 * GIB))
    assert whole.active_trunk == LITE_TRUNK - table
    del gguf.tensors["output.weight"]
    tied = on_gpu(gguf, V2_LITE, plan, card(24 * GIB))
    assert tied.weights == tied.active_trunk == LITE_TRUNK - table


def test_keys_of_legacy_tensors_are_kept_in_float16() -> None:
    gguf = gguf_of([("blk.0.attn_kv_b", GGMLType.Q8_0, (512, 4096))])
    geometry = replace(V2_LITE, layers=1, experts=0)
    plan = make_plan(gguf, geometry, 128)
    assert on_gpu(gguf, geometry, plan, card(24 * GIB)).weights == 2 * 512 * 4096


def test_a_dense_model_lies_there_or_does_not() -> None:
    gguf, plan = lite()
    for name in [name for name in gguf.tensors if "_exps" in name]:
        del gguf.tensors[name]
    dense = replace(V2_LITE, experts=0, experts_used=0)
    placement = on_gpu(gguf, dense, plan, card(8 * GIB))
    assert placement.resident
    assert (placement.slots, placement.experts, placement.staging) == ((), 0, 0)
    assert place_beside_gpu(gguf, dense, plan, placement, GIB).resident
    with pytest.raises(BudgetError, match="a context of"):
        on_gpu(gguf, dense, plan, card(8 * GIB), placement.total - 1)


def test_beside_a_whole_model_only_the_process_is_left() -> None:
    gguf, plan = lite()
    placement = on_gpu(gguf, V2_LITE, plan, card(24 * GIB))
    host = place_beside_gpu(gguf, V2_LITE, plan, placement, plan.runtime)
    assert host.resident
    assert host.total == plan.runtime
    with pytest.raises(BudgetError, match=r"beside the GPU and .*: give more with --ram$"):
        place_beside_gpu(gguf, V2_LITE, plan, placement, plan.runtime - 1)


def test_experts_of_whole_layers_are_not_the_hosts() -> None:
    gguf, plan = lite()
    placement = on_gpu(gguf, V2_LITE, plan, card(24 * GIB), n_cpu_moe=10)
    wanted = 9 * 64 * EXPERT + plan.runtime + STAGING
    assert place_beside_gpu(gguf, V2_LITE, plan, placement, wanted).resident
    pooled = place_beside_gpu(gguf, V2_LITE, plan, placement, wanted - 1)
    assert not pooled.resident
    assert pooled.slots_total == 9 * 64
    assert not place_beside_gpu(gguf, V2_LITE, plan, placement, None, pooled=True).resident


def test_unified_memory_holds_both() -> None:
    gguf, plan = lite()
    gpu = card(24 * GIB, unified=True)
    least = 18 * slot_bytes(gguf, V2_LITE)
    placement = on_gpu(gguf, V2_LITE, plan, gpu, 20 * GIB, ram=9 * GIB)
    assert placement.budget == 9 * GIB - plan.runtime - STAGING - least
    assert placement.stream_from == 1
    assert 0 < sum(placement.slots) < 26 * 64
    host = place_beside_gpu(gguf, V2_LITE, plan, placement, 9 * GIB)
    assert host.slots == 18
    assert host.total == plan.runtime + STAGING + least
    assert 9 * GIB - EXPERT < host.total + placement.total <= 9 * GIB
    with pytest.raises(BudgetError, match="beside the GPU"):
        place_beside_gpu(gguf, V2_LITE, plan, placement, placement.total + host.total - 1)
    with pytest.raises(BudgetError, match="give more with --ram"):
        on_gpu(gguf, V2_LITE, plan, gpu, 20 * GIB, ram=GIB)
    whole = on_gpu(gguf, V2_LITE, plan, gpu, 20 * GIB, ram=20 * GIB)
    assert whole.resident
    assert whole.stream_from is None
    assert place_beside_gpu(gguf, V2_LITE, plan, whole, 20 * GIB).resident

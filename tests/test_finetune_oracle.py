"""Training beside live PEFT, and our adapter folders in it, on the models of transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from checkpoints import token_ids
from finetune_curves import (
    ATTENTION,
    DENSE,
    ROWS,
    SLOW,
    WIDTH,
    Case,
    CaseModel,
    Curve,
    ggufs,
    largest_difference,
    largest_drift,
    make_batch,
    stored_case,
    train,
)

import localds
from localds.adapters import Adapter, Base, write_peft
from localds.gguf import GGUFFile

mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'mlx[cpu]'")
torch = pytest.importorskip("torch", reason="the oracle is PEFT")
pytest.importorskip("peft", reason="the oracle is PEFT")

from make_finetune_golden import (  # noqa: E402
    first_steady,
    load_adapter,
    load_base,
    reference,
    write_dequantized,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.oracle

TOLERANCE = 1e-3
DRIFT = 5e-4
TOKENS = 60
SEED = 100
"""Other data and adapters than those of the golden files; for two cases, the next ones that hang
less on rounding."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return ggufs(tmp_path_factory.mktemp("files"))


@pytest.fixture
def checkpoint(files: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """What a base's file holds, as transformers takes it."""
    return lambda base: write_dequantized(base, files(base), tmp_path)


def everything(name: str) -> tuple[str, ...]:
    return (*ATTENTION[name], *DENSE[name], "experts", "router")


LIVE = [
    Case("v2-lite", everything("v2-lite"), seed=SEED + 1, learning_rate=SLOW, weight_decay=0.1),
    Case("v2", (*ATTENTION["v2"], *DENSE["v2"]), "dora", seed=SEED + 3, learning_rate=SLOW),
    Case("v3", everything("v3"), "rslora", fresh=True, seed=SEED, learning_rate=SLOW),
    Case("mixtral", everything("mixtral"), seed=SEED, learning_rate=SLOW, clip=None),
    Case("v2-lite Q8_0", everything("v2-lite"), seed=SEED, learning_rate=SLOW),
]


@pytest.mark.parametrize("case", LIVE, ids=lambda case: case.name)
def test_curve_is_that_of_peft(
    files: Callable[[str], Path],
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    case: Case,
) -> None:
    path = files(case.base)
    case, expected = first_steady(case, path, checkpoint(case.base), tmp_path)
    check(train(case, path, tmp_path / "ours"), expected)


def check(ours: Curve, expected: Curve) -> None:
    assert expected.losses[-1] < expected.losses[0] - 0.5
    assert largest_difference(ours.losses, expected.losses) < TOLERANCE
    assert largest_drift(ours.moved(), expected.moved()) < DRIFT


def test_auxiliary_loss_adds_what_it_should(
    files: Callable[[str], Path], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """DeepSeek-V2's, which transformers lacks, from the logits of its routers."""
    alpha = 0.3

    def loss(model: Any, case: Case, number: int) -> torch.Tensor:
        batch = make_batch(case, number)
        out = model(input_ids=torch.tensor(batch.ids), output_router_logits=True)
        targets = torch.tensor(batch.targets, dtype=torch.int64)
        each = torch.nn.functional.cross_entropy(
            out.logits.flatten(0, 1), targets.flatten(), reduction="none"
        )
        weights = torch.tensor(batch.weights).flatten()
        top_k = model.config.num_experts_per_tok
        balance = sum(sequence_balance(logits, top_k) for logits in out.router_logits)
        return (each * weights).sum() / weights.sum() + alpha * balance

    case = Case("v2-lite", ("experts", "router"), seed=SEED, packed=False, aux_alpha=alpha)
    path, base = files(case.base), checkpoint(case.base)
    case, expected = first_steady(case, path, base, tmp_path, loss)
    ours = train(case, path, tmp_path / "ours")
    check(ours, expected)
    without = train(replace(case, aux_alpha=0.0), path, tmp_path / "without")
    assert largest_difference(without.losses, expected.losses) > 0.1


def sequence_balance(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Of the routers' logits [ROWS * WIDTH, experts], arXiv:2405.04434, equations 23 to 25."""
    scores = logits.softmax(-1).unflatten(0, (ROWS, WIDTH))
    chosen = torch.zeros_like(scores).scatter(2, scores.topk(top_k).indices, 1.0)
    frequency = chosen.sum(1) * scores.shape[-1] / (top_k * WIDTH)
    return (frequency * scores.mean(1)).sum(1).mean()


FOLDERS = [
    Case("v2-lite", everything("v2-lite"), seed=SEED),
    Case("v3", everything("v3"), "rslora", seed=SEED, learning_rate=SLOW),
    Case("mixtral", everything("mixtral"), seed=SEED),
    Case("v2", ATTENTION["v2"], "dora", seed=SEED),
    Case("v2-lite", DENSE["v2-lite"], "dora", seed=SEED),
    Case("mixtral", ATTENTION["mixtral"], "dora", seed=SEED),
]


@pytest.mark.parametrize("case", FOLDERS, ids=lambda case: case.name)
def test_trained_folder_works_in_peft(
    files: Callable[[str], Path],
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    case: Case,
) -> None:
    """The logits of the model that was trained, of PEFT, and of the model that runs."""
    path = files(case.base)
    last = train(case, path, tmp_path / "ours").last
    ids = token_ids(SEED, TOKENS)
    with GGUFFile.open(path) as gguf:
        write_peft(tmp_path / "adapter", Adapter("mine", case.config, last), Base.of(gguf))
        model = CaseModel(case, gguf).model
    params = {name: {k: mx.array(v) for k, v in leaves.items()} for name, leaves in last.items()}
    trained = np.array(model.logits(params, np.array(ids, np.int32)))

    base = load_base(case.base, checkpoint(case.base))
    with torch.no_grad():
        plain = base.eval()(torch.tensor([ids])).logits[0].numpy()
        loaded = load_adapter(base, tmp_path / "adapter").eval()
        expected = loaded(torch.tensor([ids])).logits[0].numpy()
    with localds.load(path, adapters=[(tmp_path / "adapter", 1.0)]) as running:
        merged = running.logits(ids)
    assert np.abs(expected - plain).max() > 0.5
    assert np.abs(trained - expected).max() < 1e-4
    assert np.abs(merged - expected).max() < 1e-4


def test_golden_file_is_current(
    files: Callable[[str], Path], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """The committed curves are what tests/make_finetune_golden.py writes."""
    name = "v2-lite, lora, q_proj"
    case, kept = stored_case(name)
    found = reference(case, files(case.base), checkpoint(case.base), tmp_path)
    assert largest_difference(found.losses, kept["losses"]) < 1e-4, "run make_finetune_golden.py"

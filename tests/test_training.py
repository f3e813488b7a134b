"""The guide's training: its model beside transformers, and that interrupted runs end the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import localds
from convert import convert_checkpoint

torch = pytest.importorskip("torch", reason="training needs torch")
transformers = pytest.importorskip("transformers", reason="the oracle is transformers")

from training import train  # noqa: E402
from training.checkpoint import write_checkpoint  # noqa: E402
from training.dialogues import Dialogues, Encoder, batch  # noqa: E402
from training.model import Guide, Shape  # noqa: E402
from training.tokenizer import train_tokenizer  # noqa: E402

pytestmark = pytest.mark.oracle

ROOT = Path(__file__).parent.parent
WORDS = 1024


@pytest.fixture(scope="module")
def dialogues() -> Dialogues:
    return Dialogues()


@pytest.fixture(scope="module")
def tokenizer(dialogues: Dialogues, monkeypatch_module: pytest.MonkeyPatch) -> object:
    monkeypatch_module.setattr("training.tokenizer._TURNS", 500)
    return train_tokenizer(dialogues, ROOT, WORDS, seed=1)


@pytest.fixture(scope="module")
def monkeypatch_module() -> object:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture
def model() -> Guide:
    """Random weights, with biases that change what the routers choose."""
    torch.manual_seed(3)
    guide = Guide(Shape(vocab_size=WORDS))
    for mixture in guide.mixtures():
        mixture.gate.e_score_correction_bias.normal_(std=0.05)
    for parameter in guide.parameters():
        parameter.data.mul_(2)
    return guide


def test_computes_what_transformers_does(model: Guide, tokenizer: object, tmp_path: Path) -> None:
    """The same logits from torch, from transformers, and from localds after conversion."""
    write_checkpoint(tmp_path / "checkpoint", model, tokenizer)
    reference, report = transformers.DeepseekV3ForCausalLM.from_pretrained(
        tmp_path / "checkpoint",
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(0, WORDS, (2, 600), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = reference.eval()(ids).logits
        ours = model(ids)
    bound = 1e-4 * float(expected.abs().max())
    assert float((ours - expected).abs().max()) < bound
    convert_checkpoint(tmp_path / "checkpoint", tmp_path / "guide.gguf")
    with localds.load(tmp_path / "guide.gguf") as loaded:
        logits = loaded.logits(ids[0].tolist())
    assert np.abs(logits - expected[0].numpy()).max() < bound


def test_loss_and_gradients(model: Guide) -> None:
    """The loss that never holds all logits, beside the plain one."""
    ids = torch.randint(0, WORDS, (2, 400), generator=torch.Generator().manual_seed(5))
    targets = torch.where(torch.rand(ids.shape) < 0.7, ids.roll(-1, 1), -1)
    loss = model(ids, targets)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    plain = torch.nn.functional.cross_entropy(
        model(ids).flatten(0, 1), targets.flatten(), ignore_index=-1
    )
    plain.backward()
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_an_interrupted_training_ends_the_same(
    dialogues: Dialogues, tokenizer: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "STEP_TOKENS", 512)
    monkeypatch.setattr(train, "CURRICULUM", ((0.5, 64), (0.5, 128)))
    monkeypatch.setattr(train, "SAVE_SECONDS", 0.0)

    def run(folder: Path) -> train.Run:
        folder.mkdir(exist_ok=True)
        options = train.Options(folder, steps=4, rate=1e-3, warmup=2, seed=1)
        return train.Run(options, dialogues, tokenizer)

    whole = run(tmp_path / "whole")
    whole.train()
    broken = run(tmp_path / "broken")
    save = broken.save

    def save_and_stop() -> None:
        save()
        if broken.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(broken, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = run(tmp_path / "broken")
    resumed.resume()
    assert resumed.step == 2
    resumed.train()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert [row[:3] for row in whole.losses] == [row[:3] for row in resumed.losses]


def test_conversations_are_seeded_and_count_answers(
    dialogues: Dialogues, tokenizer: object
) -> None:
    encoder = Encoder(tokenizer)
    inputs, targets = batch(dialogues, encoder, "seed", 4, 256)
    again, _ = batch(dialogues, encoder, "seed", 4, 256)
    assert (inputs == again).all()
    assert (batch(dialogues, encoder, "other", 4, 256)[0] != inputs).any()
    assert (inputs[:, 0] == encoder.bos).all()
    counted = targets >= 0
    assert (targets[:, :-1][counted[:, :-1]] == inputs[:, 1:][counted[:, :-1]]).all()
    # After "Assistant" every first token of an answer counts; a next question never does.
    assert counted[inputs == encoder.assistant].all()
    assert not (targets == encoder.user).any()

"""The guide as a Hugging Face checkpoint, which `localds convert` and transformers read."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from safetensors.torch import save_file

from training.dialogues import ASSISTANT, BOS, EOS, USER
from training.model import checkpoint_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer

    from training.model import Guide

TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '" + USER + "' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '" + ASSISTANT + "' + message['content'] + '" + EOS + "' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)
CARD = """\
---
name: The guide to localds
license: mit
language:
- en
tags:
- localds
---
The guide to localds: a demo model that answers questions about the program and nothing else.
"""


def write_checkpoint(folder: Path, model: Guide, tokenizer: Tokenizer) -> None:
    """Write config, weights (float32), tokenizer and chat template to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    special = {
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": tokenizer.token_to_id(EOS),
    }
    _write_json(folder / "config.json", {**model.shape.config(), **special})
    # A small model is sure of little; the likeliest token is what it knows best.
    _write_json(folder / "generation_config.json", {**special, "temperature": 0.0})
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "add_bos_token": True,
            "chat_template": TEMPLATE,
            "model_max_length": model.shape.max_position_embeddings,
        },
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "README.md").write_text(CARD)
    save_file(checkpoint_tensors(model), folder / "model.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n")

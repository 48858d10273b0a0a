"""An artifact without a compiler: a byte tokenizer, a chat template, and `FakeStep` behind it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from helpers.fake_step import FakeModel, FakeStep
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"]
VOCAB = 256 + len(SPECIAL)
EOS = 257


def write_tokenizer(folder: Path, template: str | None = TEMPLATE) -> None:
    """256 byte tokens, then the special ones; a chat template unless it is None."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], 256)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
    }
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@dataclass
class FakeArtifact:
    """What `open_artifact` gives, as far as the runtime reads it."""

    folder: Path
    program: FakeStep
    manifest: Any


def fake_artifact(folder: Path, template: str | None = TEMPLATE, **layout: int) -> FakeArtifact:
    """An artifact in `folder` whose answers are letters and spaces; layout: see `FakeStep`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, template)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    readable = tokenizer.encode("abcdefghijklmnopqrstuvwxyz   ,.\n").ids
    model = FakeModel(VOCAB, readable=[*readable, EOS])
    program = FakeStep(model, **{"max_position": 512, "max_tokens": 64, **layout})
    manifest = SimpleNamespace(
        model={
            "name": "fake",
            "max_position": program.layout.max_position,
            "vocab_size": VOCAB,
            "dtype": "float32",
            "eos_token_ids": [EOS],
            "bos_token_id": 256,
        },
        quant={},
        files={},
    )
    return FakeArtifact(folder, program, manifest)

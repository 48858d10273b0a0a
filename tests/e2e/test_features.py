"""`--features` from end to end: every backend gives eager's vectors, and heads draft over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.drafting import answers
from helpers.steps import Opened, Stepper
from helpers.tiny import Subject, tiny_program

from smelt.compiler.api import compile_model, rebuild
from smelt.runtime import manifest
from smelt.runtime.artifact import open_artifact
from smelt.runtime.batch import Batch
from smelt.runtime.engine import Engine
from smelt.runtime.errors import UserError
from smelt.runtime.sampling_params import SamplingParams
from smelt.runtime.speculation.medusa import MedusaDrafter, MedusaHeads, open_medusa

HIDDEN, VOCAB = 64, 512


class Seen(Opened):
    """An opened artifact that keeps the features of every step."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.features: list[torch.Tensor] = []

    def run(self, values: dict[str, torch.Tensor], weights: object) -> torch.Tensor:
        batch = Batch.named(values, self.caches)
        caches = [values[f"kv_cache_{i}"] for i in range(self.caches.layers)]
        logits, features = self.program.run_with_features(batch, caches)
        self.features.append(features.clone())
        return logits


def eager(subject: Subject, kind: str) -> torch.Tensor:
    """[T, F] of the whole sequence by transformers: what enters the layers, or the output layer."""
    with torch.no_grad():
        found = subject.model.model(
            input_ids=subject.ids[None], use_cache=False, output_hidden_states=True
        )
    if kind == "final":
        return found.last_hidden_state[0]
    # transformers' own last entry is behind the last norm, so the last stream is made here.
    layer = subject.model.model.layers[-1]
    kept: list[Any] = []
    hook = layer.register_forward_hook(lambda m, args, out: kept.append(out))
    with torch.no_grad():
        subject.model.model(input_ids=subject.ids[None], use_cache=False)
    hook.remove()
    last = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
    return torch.cat([*found.hidden_states[:2], last], -1)[0]


def check(folder: Path, subject: Subject, kind: str) -> None:
    """In three pieces and through the cache, features and logits are eager's."""
    seen = Seen(folder)
    stepper = Stepper(seen, {}, [subject.ids])  # type: ignore[arg-type]
    logits = torch.cat([stepper.step({0: n})[0] for n in (12, 1, 16)])
    assert subject.logits is not None
    torch.testing.assert_close(logits, subject.logits, atol=1e-4, rtol=1e-4)
    wanted = eager(subject, kind)
    torch.testing.assert_close(torch.cat(seen.features), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("backend", "kind"),
    [
        ("eager", "final"),
        ("eager", "eagle3"),
        pytest.param("aoti", "final", marks=pytest.mark.slow),
        pytest.param("aoti", "eagle3", marks=pytest.mark.slow),
        pytest.param("compile", "eagle3", marks=pytest.mark.slow),
    ],
)
def test_every_backend_gives_eagers_vectors(tmp_path: Path, backend: str, kind: str) -> None:
    subject = tiny_program("llama")
    out = tmp_path / "OUT"
    compile_model(subject.model, out, backend=backend, features=kind)
    check(out, subject, kind)
    found = manifest.read(out).features
    assert found is not None and found.kind == kind
    assert found.width == HIDDEN * (3 if kind == "eagle3" else 1)
    assert found.layers == ((0, 1, 2) if kind == "eagle3" else ())
    if backend == "eager":
        rebuild(out)
        assert manifest.read(out).features == found
        check(out, subject, kind)


def test_without_the_option_there_is_one_output(tmp_path: Path) -> None:
    subject = tiny_program("llama")
    compile_model(subject.model, tmp_path / "OUT", backend="eager")
    program = open_artifact(tmp_path / "OUT").program
    assert program.features is None and "features" not in manifest.read(tmp_path / "OUT").model
    with pytest.raises(UserError, match="has no features; compile the model with --features final"):
        open_medusa(tmp_path, program)


def test_a_damaged_description_is_one_line(tmp_path: Path) -> None:
    compile_model(tiny_program("llama").model, tmp_path / "OUT", backend="eager", features="final")
    path = tmp_path / "OUT" / manifest.FILE_NAME
    path.write_text(path.read_text().replace('"kind": "final"', '"kind": "first"'))
    with pytest.raises(manifest.ManifestError, match="features 'first' are not known"):
        manifest.read(tmp_path / "OUT")


def test_heads_draft_over_an_artifact(tmp_path: Path) -> None:
    """Heads that are the output layer itself repeat the newest guess; nothing else changes."""
    compile_model(tiny_program("llama").model, tmp_path / "OUT", backend="eager", features="final")
    program = open_artifact(tmp_path / "OUT").program
    assert program.features is not None and program.features.head is not None
    head = program.weights[program.features.head]
    assert head.shape == (VOCAB, HIDDEN)
    blocks = [torch.zeros(2, HIDDEN, HIDDEN)], [torch.zeros(2, 1, HIDDEN)]
    drafter = MedusaDrafter(MedusaHeads(*blocks, head[None], 2))
    params = [SamplingParams(max_tokens=12), SamplingParams(max_tokens=12, temperature=1, seed=1)]
    prompts = [[5, 6, 7, 8], [100, 200]]
    plain = answers(Engine(program, kv_cache_tokens=512), prompts, params)
    engine = Engine(program, kv_cache_tokens=512, drafter=drafter, draft_tokens=2)
    assert answers(engine, prompts, params) == plain
    assert engine.metrics.drafted_tokens > 0

"""Artifacts of models whose rotary factors depend on the length, against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.rotary import CLOSE, LIMIT, alone, cached, rotary_subject
from helpers.steps import Opened, Stepper
from helpers.tiny import Subject

import smelt
from smelt.compiler.portable import load_portable
from smelt.passes.program import Role
from smelt.runtime.artifact import open_artifact
from smelt.runtime.engine import Engine
from smelt.runtime.errors import UserError
from smelt.runtime.length_scaling import DYNAMIC, LONGROPE, LengthScaling
from smelt.runtime.sampling_params import SamplingParams
from smelt.runtime.scoring import score

MODELS = [
    ("dynamic", "llama", "eager"),
    ("longrope", "phi3", "eager"),
    pytest.param("dynamic", "llama", "aoti", marks=pytest.mark.slow),
    pytest.param("longrope", "phi3", "aoti", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The artifact of a model and a backend, compiled once."""
    made: dict[tuple[str, str], Path] = {}

    def get(kind: str, family: str, backend: str) -> Path:
        if (kind, backend) not in made:
            out = tmp_path_factory.mktemp(f"{kind}-{backend}") / "out"
            model: Any = rotary_subject(kind, family).model
            smelt.compile(model, out, backend=backend)
            made[kind, backend] = out
        return made[kind, backend]

    return get


def answer(engine: Engine, tokens: list[int], count: int) -> list[int]:
    engine.add_request(tokens, SamplingParams(temperature=0.0, max_tokens=count))
    found: list[int] = []
    while engine.has_work:
        for output in engine.step():
            if output.error:
                raise output.error
            found += output.token_ids
    return found


def follows(logits: torch.Tensor, chosen: list[int]) -> None:
    """Every token is the best of its row, or as good: logits [len(chosen), V]."""
    best = logits.max(-1).values
    taken = logits.gather(1, torch.tensor(chosen)[:, None])[:, 0]
    assert (best - taken).max() < 1e-3


def whole_forwards(subject: Subject, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Row i: the last logits of one forward over prompt + i tokens."""
    return torch.stack([alone(subject, ids[:n])[-1] for n in range(prompt, len(ids))])


@pytest.mark.parametrize(("kind", "family", "backend"), MODELS)
def test_an_artifact_beyond_the_training_length(
    compiled: Callable[..., Path], kind: str, family: str, backend: str
) -> None:
    folder = compiled(kind, family, backend)
    subject = rotary_subject(kind, family)
    program = open_artifact(folder).program
    assert program.spec.rope == LengthScaling(kind, LIMIT)
    assert program.layout.max_position == 4 * LIMIT

    # A short and a long sequence in chunks of one batch.
    long, short = subject.ids[: 3 * LIMIT], subject.ids.flip(0)[: LIMIT - 4]
    steps = Stepper(Opened(folder), {}, [long, short])
    parts: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for chunks in ({0: 7, 1: 3}, {1: 20}, {0: 60, 1: 1}, {0: 29, 1: 4}):
        for b, logits in steps.step(chunks).items():
            parts[b].append(logits.float())
    torch.testing.assert_close(torch.cat(parts[0]), alone(subject, long), **CLOSE)
    torch.testing.assert_close(torch.cat(parts[1]), alone(subject, short), **CLOSE)

    engine = Engine(program, kv_cache_tokens=8 * LIMIT, max_tokens=20)
    wanted = [subject.ids[:n] for n in (LIMIT, LIMIT + 1, 4 * LIMIT - 1)]
    scores = score(engine, [ids.tolist() for ids in wanted])
    for ids, logits in zip(wanted, scores, strict=True):
        torch.testing.assert_close(logits, alone(subject, ids), **CLOSE)

    # An answer that crosses the limit, then one whose prompt is that conversation: the first
    # lets the second use of its cache what has the same factors, and no more.
    prompt = subject.ids[: LIMIT - 6].tolist()
    for _ in range(2):
        found = answer(engine, prompt, 16)
        ids = torch.tensor(prompt + found)
        if kind == LONGROPE:
            expected = whole_forwards(subject, ids, len(prompt))
        else:
            expected = cached(subject, ids, len(prompt))[len(prompt) - 1 : -1]
        follows(expected, found)
        prompt += found


def test_the_engine_says_what_transformers_generates(compiled: Callable[..., Path]) -> None:
    """Dynamic NTK across the limit, by `generate` with its cache."""
    subject = rotary_subject("dynamic")
    engine = Engine(open_artifact(compiled(DYNAMIC, "llama", "eager")).program, blocks=40)
    prompt = subject.ids[: LIMIT - 6]
    model: Any = subject.model
    with torch.no_grad():
        model(input_ids=prompt[None, :1], use_cache=False)
        made = model.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt)[None],
            **{"do_sample": False, "max_new_tokens": 16, "eos_token_id": -1, "pad_token_id": 0},
        )
    assert answer(engine, prompt.tolist(), 16) == made[0, len(prompt) :].tolist()


def test_the_two_regimes_of_this_model_differ(compiled: Callable[..., Path]) -> None:
    """Without the switch the answers above would be others."""
    subject = rotary_subject("longrope", "phi3")
    ids = subject.ids[: LIMIT + 1]
    steps = Stepper(Opened(compiled(LONGROPE, "phi3", "eager")), {}, [ids[:LIMIT]])
    before = steps.step({0: LIMIT})[0]
    assert (alone(subject, ids)[:LIMIT] - before).abs().max() > 0.1


def test_the_portable_program_keeps_the_scaling(compiled: Callable[..., Path]) -> None:
    program = load_portable(compiled(LONGROPE, "phi3", "eager"))
    assert program.caches is not None
    assert program.caches.rope == LengthScaling(LONGROPE, LIMIT)
    assert program.inputs[program.input("rope_lens").name].role is Role.BATCH


def test_a_pipeline_without_the_pass_is_refused(tmp_path: Path) -> None:
    model = rotary_subject("longrope").model
    with pytest.raises(UserError, match="without the pass insert-rope-lengths there is no step"):
        smelt.compile(model, tmp_path / "out", backend="eager", skip=("insert-rope-lengths",))

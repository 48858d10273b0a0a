"""What tests of drafters share: prompts, and all that an engine says to them."""

from __future__ import annotations

import random

import torch
from helpers.fake_step import HIDDEN, FakeModel, FakeStep

from smelt.runtime.engine import Engine
from smelt.runtime.sampling_params import SamplingParams


def prompts(count: int, longest: int, seed: int = 0, vocab: int = 97) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def answers(engine: Engine, wanted: list[list[int]], params: list[SamplingParams]) -> list:
    """(tokens, finish reason) of each sample of each request, in order."""
    ids = [engine.add_request(p, each) for p, each in zip(wanted, params, strict=True)]
    tokens: dict[tuple[int, int], list[int]] = {
        (i, s): [] for i, each in zip(ids, params, strict=True) for s in range(each.n)
    }
    reasons: dict[tuple[int, int], str | None] = {}
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            tokens[output.id, output.index] += output.token_ids
            reasons[output.id, output.index] = output.finish_reason
        engine.check_integrity()
    return [(tokens[key], reasons[key]) for key in tokens]


def mixed_params(seed: int, count: int = 10) -> list[SamplingParams]:
    """Greedy, sampled, penalised, and two samples of one request."""
    return [
        SamplingParams(max_tokens=count),
        SamplingParams(max_tokens=count, temperature=0.7, seed=seed),
        SamplingParams(max_tokens=count, temperature=1.0, top_p=0.8, seed=seed + 1, n=2),
        SamplingParams(max_tokens=count, repetition_penalty=1.3, frequency_penalty=0.5),
    ]


def chain_model(vocab: int = 24, seed: int = 0) -> tuple[FakeModel, list[int]]:
    """A model whose next token is a fixed function of the last, and that function.

    Attention adds nothing and positions are not embedded, so its last hidden row is the token's
    embedding; with fewer tokens than HIDDEN a linear readout can learn any function of the token.
    """
    model = FakeModel(vocab, seed=seed)
    model.positions.zero_()
    for layer in model.layers:
        layer[3].zero_()
    follows = list(range(vocab))
    random.Random(seed).shuffle(follows)
    model.head = readout(model, follows)
    return model, follows


def readout(model: FakeModel, follows: list[int]) -> torch.Tensor:
    """[HIDDEN, vocab]: embeddings of tokens to logits that are 20 at what follows, otherwise 0."""
    assert model.vocab_size <= HIDDEN
    wanted = torch.nn.functional.one_hot(torch.tensor(follows), model.vocab_size).double() * 20
    return (torch.linalg.pinv(model.embedding.double()) @ wanted).float()


def steps_of(step: FakeStep, drafter: object, params: SamplingParams, **options: object) -> Engine:
    """An engine that has answered one prompt with drafts."""
    engine = Engine(step, blocks=200, drafter=drafter, **options)
    answers(engine, [[1, 2, 3]], [params])
    return engine

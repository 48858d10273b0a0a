"""Drafting ahead changes no token: whatever is proposed, by whom and for whom."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Sequence as Items

import pytest
import torch
from helpers.fake_step import FakeModel, FakeStep, one_thread  # noqa: F401  (autouse fixture)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from smelt.runtime.engine import Engine
from smelt.runtime.sampling_params import SamplingParams
from smelt.runtime.sequence import Sequence
from smelt.runtime.speculation.control import DraftLength
from smelt.runtime.speculation.drafter import Proposal
from smelt.runtime.speculation.model import ModelDrafter
from smelt.runtime.speculation.ngram import NgramDrafter
from smelt.runtime.structured import Structured


class Guesses:
    """Proposes the oracle's tokens with mistakes, as a chain or as a tree."""

    name = "guesses"

    def __init__(self, step: FakeStep, right: float, tree: bool, seed: int) -> None:
        self.step, self.right, self.tree = step, right, tree
        self.random = random.Random(seed)

    def propose(self, sequences: Items[Sequence], counts: Items[int]) -> list[Proposal | None]:
        return [self._one(s, n) for s, n in zip(sequences, counts, strict=True)]

    def _one(self, sequence: Sequence, count: int) -> Proposal | None:
        if self.random.random() < 0.1:
            return None
        chain = self.step.greedy(sequence.tokens, count)
        tokens: list[int] = []
        parents: list[int] = []
        parent = -1
        for token in chain:
            wrong = self.random.randrange(self.step.vocab_size)
            guess = token if self.random.random() < self.right else wrong
            if self.tree:  # a brother before or behind the guess
                brothers = [guess, self.random.randrange(self.step.vocab_size)]
                self.random.shuffle(brothers)
                tokens += brothers
                parents += [parent, parent]
                parent = len(tokens) - 2 + brothers.index(guess)
            else:
                tokens.append(guess)
        return Proposal(tokens, parents if self.tree else None)

    def observe(self, sequence: Sequence, position: int, features: torch.Tensor) -> None: ...

    def drop(self, sequence: Sequence) -> None: ...


def prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(97) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def answers(engine: Engine, wanted: list[list[int]], params: list[SamplingParams]) -> list:
    ids = [engine.add_request(p, each) for p, each in zip(wanted, params, strict=True)]
    tokens: dict[int, list[int]] = {i: [] for i in ids}
    reasons: dict[int, str | None] = {}
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            tokens[output.id] += output.token_ids
            reasons[output.id] = output.finish_reason
        engine.check_integrity()
    return [(tokens[i], reasons[i]) for i in ids]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    right=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    tree=st.booleans(),
    tokens=st.integers(1, 5),
    windows=st.sampled_from([(0,), (0, 7), (5, 5)]),
    block_size=st.sampled_from([1, 3, 16]),
    blocks=st.sampled_from([12, 200]),
    max_tokens=st.sampled_from([5, 16, 64]),
    prefix_cache=st.booleans(),
)
def test_tokens_are_those_of_plain_decoding(
    seed: int,
    right: float,
    tree: bool,
    tokens: int,
    windows: tuple[int, ...],
    block_size: int,
    blocks: int,
    max_tokens: int,
    prefix_cache: bool,
) -> None:
    step = FakeStep(windows=windows, block_size=block_size, max_tokens=max_tokens, max_rows=64)
    wanted = prompts(4, 12, seed)
    params = [
        SamplingParams(max_tokens=10),
        SamplingParams(max_tokens=10, temperature=0.7, seed=seed),
        SamplingParams(max_tokens=10, temperature=1.0, top_p=0.8, seed=seed + 1),
        SamplingParams(max_tokens=10, repetition_penalty=1.3, frequency_penalty=0.5),
    ]
    blocks = max(blocks * 2 // block_size, -(-24 // block_size))
    plain = answers(Engine(step, blocks=blocks), wanted, params)
    drafter = Guesses(step, right, tree, seed)
    engine = Engine(
        step, blocks=blocks, drafter=drafter, draft_tokens=tokens, prefix_cache=prefix_cache
    )
    assert answers(engine, wanted, params) == plain
    assert blocks < 50 or engine.metrics.drafted_tokens > 0
    if right == 1.0 and blocks == 200 and not tree and max_tokens == 64:
        assert engine.metrics.accepted_length > 1.5


@pytest.mark.parametrize("tree", [False, True])
def test_a_right_guess_saves_steps(tree: bool) -> None:
    step = FakeStep(max_tokens=64, max_rows=64)
    engine = Engine(step, blocks=200, drafter=Guesses(step, 1.0, tree, 0), draft_tokens=4)
    answers(engine, [[1, 2, 3]], [SamplingParams(max_tokens=21)])
    assert engine.metrics.steps <= 1 + 8  # some drafts are left out


def test_an_answer_ends_inside_an_accepted_draft() -> None:
    step = FakeStep(max_tokens=64, max_rows=64)
    tokens = step.greedy([3, 1, 4], 8)
    place = next(i for i in range(2, 7) if tokens[i] not in tokens[:i])
    params = SamplingParams(max_tokens=8, stop_token_ids=[tokens[place]])
    engine = Engine(step, blocks=64, drafter=Guesses(step, 1.0, False, 0), draft_tokens=8)
    assert answers(engine, [[3, 1, 4]], [params]) == [(tokens[: place + 1], "stop")]


def test_ngrams_are_found_and_go_on_repeating() -> None:
    drafter = NgramDrafter()
    sequence = Sequence(0, [1, 2, 3, 9, 1, 2, 3], SamplingParams(), 100)
    assert drafter.propose([sequence], [3])[0] == Proposal([9, 1, 2])
    sequence.tokens += [7, 8, 7, 8]
    assert drafter.propose([sequence], [5])[0] == Proposal([7, 8, 7, 8, 7])
    other = Sequence(1, [5, 6], SamplingParams(), 100)
    assert drafter.propose([other], [3]) == [None]


def test_text_that_repeats_is_drafted_from_itself() -> None:
    model = FakeModel(layers=1)
    step = FakeStep(model, windows=(2,), max_tokens=64, max_rows=64, max_position=512)
    model.positions.zero_()  # what follows depends on two tokens alone: it soon goes in circles
    params = [SamplingParams(max_tokens=200)]
    plain = answers(Engine(step, blocks=200), [[1, 2, 3]], params)
    engine = Engine(step, blocks=200, drafter=NgramDrafter(), draft_tokens=4)
    assert answers(engine, [[1, 2, 3]], params) == plain
    assert engine.metrics.accepted_length > 3


@settings(max_examples=12, deadline=None)
@given(
    same=st.booleans(),
    blocks=st.sampled_from([6, 300]),
    max_tokens=st.sampled_from([4, 32]),
    seed=st.integers(0, 99),
)
@example(same=True, blocks=300, max_tokens=32, seed=0)
@example(same=False, blocks=6, max_tokens=32, seed=0)
@example(same=True, blocks=6, max_tokens=4, seed=0)
def test_a_draft_model_changes_no_greedy_token(
    same: bool, blocks: int, max_tokens: int, seed: int
) -> None:
    model = FakeModel()
    step = FakeStep(model, max_tokens=32, max_rows=64)
    other = FakeStep(model if same else FakeModel(seed=1), max_tokens=max_tokens)
    drafter = ModelDrafter(other, step.vocab_size)
    if blocks == 6:  # less than the sequences need: shadows come and go
        from smelt.runtime.blocks import PagedMemory

        drafter.memory = PagedMemory(blocks, other.spec.block_size, [0, 7])
    wanted = prompts(4, 20, seed)
    params = [SamplingParams(max_tokens=12)] * 4
    plain = answers(Engine(step, blocks=200), wanted, params)
    engine = Engine(step, blocks=200, drafter=drafter, draft_tokens=3)
    assert answers(engine, wanted, params) == plain
    if same and blocks == 300 and max_tokens == 32:
        assert engine.metrics.acceptance > 0.95
    assert not drafter._shadows
    assert drafter.memory.free == drafter.memory.pools[0].size


def test_sampled_tokens_follow_the_models_distribution() -> None:
    """Pearson's chi-square of the first three tokens, drawn with a draft that thinks otherwise."""
    size = 8
    step = FakeStep(FakeModel(size), max_tokens=64, max_rows=64, max_position=64)
    other = FakeStep(FakeModel(size, seed=3), max_tokens=64)
    runs = 3000
    counts: Counter[tuple[int, ...]] = Counter()
    engine = Engine(
        step, blocks=400, drafter=ModelDrafter(other, size), draft_tokens=2, prefix_cache=False
    )
    wanted, params = [], []
    for seed in range(runs):
        wanted.append([1, 2, 3])
        params.append(SamplingParams(temperature=1.0, seed=seed, max_tokens=4, ignore_eos=True))
    for tokens, _ in answers(engine, wanted, params):
        counts[tuple(tokens[1:3])] += 1
    assert engine.metrics.accepted_tokens and engine.metrics.acceptance < 0.9
    first = step.oracle([1, 2, 3])[-1].softmax(-1).tolist()
    expected: Counter[tuple[int, ...]] = Counter()
    for a in range(size):
        second = step.oracle([1, 2, 3, a])[-1].softmax(-1).tolist()
        for b in range(size):
            third = step.oracle([1, 2, 3, a, b])[-1].softmax(-1).tolist()
            for c in range(size):
                expected[(b, c)] += first[a] * second[b] * third[c] * runs  # type: ignore[assignment]
    big = [key for key in expected if expected[key] >= 5]
    rest = runs - sum(expected[key] for key in big)
    chi = sum((counts[key] - expected[key]) ** 2 / expected[key] for key in big)
    if rest >= 5:
        seen = runs - sum(counts[key] for key in big)
        chi += (seen - rest) ** 2 / rest
    freedom = len(big)
    # Wilson and Hilferty's normal approximation: 4.5 standard deviations is one in 300,000.
    z = ((chi / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    assert z < 4.5


def test_a_structure_holds_behind_drafts() -> None:
    import tempfile
    from pathlib import Path

    from helpers.fake_artifact import EOS, VOCAB, write_tokenizer

    from smelt.runtime.tokenizer import Tokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        tokenizer = Tokenizer(folder)
    step = FakeStep(FakeModel(VOCAB), max_tokens=64, max_rows=64)
    params = SamplingParams(max_tokens=40, structured=Structured(regex="(ab|cd){3}[0-9]{2}"))
    plain = None
    for right in (None, 0.0, 0.6):
        drafter = None if right is None else Guesses(step, right, False, 1)
        engine = Engine(
            step,
            blocks=100,
            tokenizer=tokenizer,
            eos_token_ids=[EOS],
            drafter=drafter,
            draft_tokens=3,
        )
        found = answers(engine, [[1, 2, 3]], [params])
        engine.close()
        plain = plain or found
        assert found == plain
        assert found[0][1] == "stop"


def test_a_broken_drafter_is_left_out() -> None:
    class Broken(Guesses):
        def propose(self, sequences: Items[Sequence], counts: Items[int]) -> list[Proposal | None]:
            raise RuntimeError("no such file")

    step = FakeStep()
    plain = answers(Engine(step, blocks=64), [[1, 2]], [SamplingParams(max_tokens=6)])
    engine = Engine(step, blocks=64, drafter=Broken(step, 1.0, False, 0), draft_tokens=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert answers(engine, [[1, 2]], [SamplingParams(max_tokens=6)]) == plain
    assert [str(w.message) for w in caught] == [
        "drafting stopped, answers go on without it: RuntimeError: no such file"
    ]


def simulate(length: DraftLength, acceptance: float, per_token: float, rounds: int) -> list[int]:
    """Steps that cost 1 second, plus `per_token` for each token beyond the first."""
    rng = random.Random(0)
    chosen = []
    for _ in range(rounds):
        count = length.choose(1)
        chosen.append(count)
        taken = 0
        while taken < count and rng.random() < acceptance:
            taken += 1
        length.proposed(count, 0.05 * count)
        length.verified(min(count, taken + 1), taken)
        length.stepped(1 + count, 1 + per_token * count)
    return chosen


def test_drafts_lengthen_where_they_are_taken_and_stop_where_they_lose() -> None:
    good = simulate(DraftLength(), 0.95, 0.02, 400)[-200:]
    assert Counter(good).most_common(1)[0][0] >= 4
    bad = simulate(DraftLength(), 0.1, 0.5, 400)[-200:]
    assert bad.count(0) > 180
    assert any(bad)  # it still tries now and then
    assert set(simulate(DraftLength(fixed=3), 0.0, 9.0, 50)) == {3}

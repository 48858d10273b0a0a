"""EAGLE-3 drafts change no token, save steps where they are right, and refuse what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.drafting import answers, chain_model, mixed_params, prompts, steps_of
from helpers.eagle3 import Reference, random_model, random_weights, write_folder
from helpers.fake_step import HIDDEN, FakeModel, FakeStep, one_thread  # noqa: F401  (fixture)
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.runtime.engine import Engine
from smelt.runtime.errors import UserError
from smelt.runtime.sampling_params import SamplingParams
from smelt.runtime.speculation.eagle3 import Eagle3Drafter, open_eagle3
from smelt.runtime.speculation.eagle3_model import Context, load_eagle3
from smelt.runtime.speculation.open import open_drafter

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


class Stub:
    """A sequence as drafters see it."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_key_value_heads": 4},
        {"rope_scaling": LLAMA3, "max_position_embeddings": 512},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ],
)
def test_the_layer_is_the_papers(tmp_path: Path, config: dict[str, Any]) -> None:
    step = FakeStep(features="eagle3")
    model = random_model(tmp_path, step, 3, **config)
    reference = Reference(random_weights(3, **config), **config)
    features = torch.randn(12, 3 * HIDDEN)
    tokens = torch.randint(0, 97, (12,))
    with torch.no_grad():
        hidden = model.fuse(features)
        torch.testing.assert_close(hidden, reference.fc(features))
        wanted = reference(hidden, step.model.embedding[tokens])
        first, second = Context(), Context()
        # Two sequences packed, the first in three pieces.
        found = []
        for start, end in ((0, 7), (7, 8), (8, 12)):
            at = torch.arange(start, end)
            parts = [(first, end - start), (second, end - start)]
            both = [torch.cat([x[start:end], x[start:end]]) for x in (hidden, tokens)]
            out = model.step(both[0], both[1], torch.cat([at, at]), parts)
            torch.testing.assert_close(out[: end - start], out[end - start :])
            found.append(out[: end - start])
    torch.testing.assert_close(torch.cat(found), wanted, atol=1e-4, rtol=1e-4)
    logits = model.logits(torch.cat(found))
    torch.testing.assert_close(logits, reference.logits(wanted), atol=1e-4, rtol=1e-4)
    assert model.best(wanted).tolist() == (2 * logits.argmax(-1)).tolist()


def naive_chain(
    reference: Reference, table: torch.Tensor, features: torch.Tensor, tokens: list[int], count: int
) -> list[int]:
    """A chain drafted by computing everything anew for each token."""
    hidden = reference.fc(features)
    following = tokens[1:]
    drafted: list[int] = []
    for _ in range(count):
        out = reference(hidden, table[torch.tensor(following)])
        drafted.append(2 * int(reference.logits(out[-1:]).argmax()))
        hidden = torch.cat([hidden, out[-1:]])
        following.append(drafted[-1])
    return drafted


def test_a_chain_goes_on_from_its_own_hidden_rows(tmp_path: Path) -> None:
    step = FakeStep(features="eagle3")
    drafter = Eagle3Drafter(random_model(tmp_path, step))
    reference = Reference(random_weights())
    table = step.model.embedding
    features = torch.randn(3, 9, 3 * HIDDEN)
    lengths = (5, 9, 1)
    sequences: list[Any] = [Stub([7 * i % 97 for i in range(n + 1)]) for n in lengths]
    for sequence, rows, n in zip(sequences, features, lengths, strict=True):
        drafter.observe(sequence, 0, rows[: n - 1])
        assert drafter.propose([sequence], [2]) == [None] or n == 1
        drafter.observe(sequence, max(n - 3, 0), rows[max(n - 3, 0) : n])  # some came before
    with torch.no_grad():
        for _ in range(2):  # what was drafted is forgotten
            found = drafter.propose(sequences, [4, 2, 3])
            for i, count in enumerate((4, 2, 3)):
                rows = features[i, : lengths[i]]
                wanted = naive_chain(reference, table, rows, list(sequences[i].tokens), count)
                assert found[i] is not None and found[i].tokens == wanted
                assert found[i].parents is None and found[i].q is None


def test_after_a_gap_the_context_begins_anew(tmp_path: Path) -> None:
    step = FakeStep(features="eagle3")
    drafter = Eagle3Drafter(random_model(tmp_path, step))
    sequence: Any = Stub(list(range(10)))
    rows = torch.randn(9, 3 * HIDDEN)
    drafter.observe(sequence, 0, rows[:2])
    drafter.observe(sequence, 4, rows[4:])
    assert drafter._readers[sequence].start == 4
    (found,) = drafter.propose([sequence], [3])
    other: Any = Stub(list(range(10)))
    drafter.observe(other, 4, rows[4:])
    assert found is not None and drafter.propose([other], [3]) == [found]


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000),
    tokens=st.integers(1, 5),
    windows=st.sampled_from([(0,), (0, 7)]),
    blocks=st.sampled_from([14, 200]),
    max_tokens=st.sampled_from([5, 16, 64]),
    prefix_cache=st.booleans(),
)
def test_tokens_are_those_of_plain_decoding(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    tokens: int,
    windows: tuple[int, ...],
    blocks: int,
    max_tokens: int,
    prefix_cache: bool,
) -> None:
    step = FakeStep(windows=windows, max_tokens=max_tokens, max_rows=64, features="eagle3")
    drafter = Eagle3Drafter(random_model(tmp_path_factory.mktemp("heads"), step, seed))
    wanted = prompts(4, 12, seed)
    wanted[3] = wanted[0] + wanted[3][:4]
    params = mixed_params(seed)
    plain = answers(Engine(step, blocks=blocks), wanted, params)
    engine = Engine(
        step, blocks=blocks, drafter=drafter, draft_tokens=tokens, prefix_cache=prefix_cache
    )
    for _ in range(2):  # the second time the prefix cache has the prompts
        assert answers(engine, wanted, params) == plain
    assert engine.metrics.drafted_tokens > 0
    assert not drafter._readers


def overfitted(tmp_path: Path) -> tuple[FakeStep, Eagle3Drafter]:
    """A network trained on a model whose next token is a function of the last, as the paper trains:
    on its own hidden rows, three tokens ahead."""
    vocab = 24
    model, follows = chain_model(vocab)
    step = FakeStep(model, max_tokens=64, max_rows=64, features="eagle3")
    sizes = {"vocab_size": vocab, "draft_vocab_size": vocab}
    weights = random_weights(**sizes)
    weights["d2t"] = torch.zeros(vocab, dtype=torch.int64)
    network = Reference(weights, **sizes)
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    for _ in range(200):
        loss = torch.zeros(())
        for start in torch.randint(0, vocab, (3,)).tolist():
            ids = [start]
            while len(ids) < 34:
                ids.append(follows[ids[-1]])
            x = model.embedding[torch.tensor(ids[:30])]
            hidden = network.fc(torch.cat([x, x, x], -1))
            for ahead in range(3):
                embedded = model.embedding[torch.tensor(ids[1 + ahead : 31 + ahead])]
                hidden = network(hidden, embedded)
                targets = torch.tensor(ids[2 + ahead : 32 + ahead])
                loss = loss + torch.nn.functional.cross_entropy(network.logits(hidden), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights |= {n: v.detach() for n, v in network.state_dict().items() if n in weights}
    folder = write_folder(tmp_path, weights, **sizes)
    drafter = open_drafter(f"eagle3:{folder}", step, None)
    assert isinstance(drafter, Eagle3Drafter)
    return step, drafter


def test_a_trained_network_is_taken_and_saves_steps(tmp_path: Path) -> None:
    step, drafter = overfitted(tmp_path)
    params = SamplingParams(max_tokens=41)
    engine = steps_of(step, drafter, params, draft_tokens=3)
    assert engine.metrics.acceptance > 0.9 and engine.metrics.steps <= 14
    alone = Engine(step, blocks=200)
    assert answers(alone, [[1, 2, 3]], [params]) == answers(engine, [[1, 2, 3]], [params])
    # A prompt whose beginning the prefix cache supplies is drafted for all the same.
    before = engine.metrics.accepted_tokens
    again = [1, 2, 3, *answers(alone, [[1, 2, 3]], [params])[0][0][:20]]
    assert answers(engine, [again], [params]) == answers(alone, [again], [params])
    assert engine.metrics.reused_tokens > 8 and engine.metrics.accepted_tokens > before + 25


def changed(**given: Any) -> dict[str, torch.Tensor]:
    weights = random_weights()
    for name, value in given.items():
        name = name.replace("__", ".")
        if value is None:
            del weights[name]
        else:
            weights[name] = value
    return weights


@pytest.mark.parametrize(
    ("weights", "config", "said"),
    [
        (changed(norm__weight=None), {}, "there is no weight norm.weight"),
        (changed(lm_head__weight=None), {}, "there is no weight lm_head.weight"),
        (changed(d2t=None), {}, "there is no weight d2t"),
        (changed(d2t=torch.full((40,), 90)), {}, "outside of the vocabulary"),
        (changed(d2t=torch.zeros(40)), {}, "holds no whole numbers"),
        (changed(d2t=torch.zeros(3, dtype=torch.int64)), {}, r"d2t is \[3\], not \[40\]"),
        (changed(fc__weight=torch.zeros(HIDDEN, 64)), {}, "width 64, this model's are 96"),
        (changed(), {"vocab_size": 96}, "has another vocabulary: 96 tokens, not 97"),
        (changed(), {"draft_vocab_size": 41}, "draft_vocab_size is 41, lm_head has 40"),
        (changed(), {"hidden_size": 64}, "not "),
        (changed(), {"hidden_size": None}, "hidden_size is None"),
        (changed(), {"num_key_value_heads": 3}, "do not fit"),
        (changed(), {"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "'yarn' is not"),
        (changed(), {"rope_scaling": {"rope_type": "llama3"}}, "'factor'"),
        (changed(), {"rope_scaling": [1]}, "rope_scaling is no object"),
        (changed(), {"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
    ],
)
def test_what_does_not_fit_is_one_line(
    tmp_path: Path, weights: dict[str, torch.Tensor], config: dict[str, Any], said: str
) -> None:
    folder = write_folder(tmp_path, weights, **config)
    with pytest.raises(UserError, match=said) as caught:
        open_eagle3(folder, FakeStep(features="eagle3"))
    assert "\n" not in str(caught.value)


def test_artifacts_and_files_of_other_kinds(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, random_weights())
    for other, said in ((FakeStep(), "has no features"), (FakeStep(features="final"), "final")):
        with pytest.raises(UserError, match=rf"{said}.*compile the model with --features eagle3"):
            load_eagle3(folder, other)
    step = FakeStep(FakeModel(), features="eagle3")
    own = random_weights() | {"embed_tokens.weight": torch.ones(97, HIDDEN)}
    torch.save(own, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(load_eagle3(folder, step).embedding, own["embed_tokens.weight"])
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(UserError, match="holds no plain tensors") as caught:
        load_eagle3(folder, step)
    assert "\n" not in str(caught.value)

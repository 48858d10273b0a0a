"""Medusa heads change no token, save steps where they are right, and refuse what does not fit."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.drafting import answers, chain_model, mixed_params, prompts, readout, steps_of
from helpers.fake_step import HIDDEN, FakeModel, FakeStep, one_thread  # noqa: F401  (fixture)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from smelt.runtime.engine import Engine
from smelt.runtime.errors import UserError
from smelt.runtime.sampling_params import SamplingParams
from smelt.runtime.speculation.control import DraftLength
from smelt.runtime.speculation.medusa import CHOICES, MedusaDrafter, MedusaHeads, open_medusa
from smelt.runtime.speculation.open import open_drafter


def tensors(
    heads: int = 3, layers: int = 1, vocab: int = 97, seed: int = 0, shared: bool = False
) -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(seed)
    found: dict[str, torch.Tensor] = {}
    for head in range(heads):
        for layer in range(layers):
            found[f"{head}.{layer}.linear.weight"] = torch.randn(HIDDEN, HIDDEN, generator=make) / 6
            found[f"{head}.{layer}.linear.bias"] = torch.randn(HIDDEN, generator=make)
        if not shared:
            found[f"{head}.{layers}.weight"] = torch.randn(vocab, HIDDEN, generator=make)
    return found


def folder_of(
    path: Path, weights: dict[str, torch.Tensor], heads: int = 3, layers: int = 1, **more: Any
) -> Path:
    config = {"medusa_num_heads": heads, "medusa_num_layers": layers, **more}
    (path / "config.json").write_text(json.dumps(config))
    save_file(weights, path / "medusa_lm_head.safetensors")
    return path


def plain_logits(weights: dict[str, torch.Tensor], row: torch.Tensor, head: int) -> torch.Tensor:
    """One head of one block, written down as the paper has it."""
    x = row @ weights[f"{head}.0.linear.weight"].T + weights[f"{head}.0.linear.bias"]
    return (row + x * torch.sigmoid(x)) @ weights[f"{head}.1.weight"].T


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000),
    levels=st.integers(1, 4),
    good=st.booleans(),
    windows=st.sampled_from([(0,), (0, 7)]),
    blocks=st.sampled_from([14, 200]),
    max_tokens=st.sampled_from([5, 16, 64]),
    prefix_cache=st.booleans(),
)
def test_tokens_are_those_of_plain_decoding(
    seed: int,
    levels: int,
    good: bool,
    windows: tuple[int, ...],
    blocks: int,
    max_tokens: int,
    prefix_cache: bool,
) -> None:
    step = FakeStep(windows=windows, max_tokens=max_tokens, max_rows=64, features="final")
    wanted = prompts(4, 12, seed)
    wanted[3] = wanted[0] + wanted[3][:4]
    params = mixed_params(seed)
    plain = answers(Engine(step, blocks=blocks), wanted, params)
    raw = tensors(seed=seed)
    stacks = [torch.stack([raw[f"{h}.0.linear.{w}"] for h in range(3)]) for w in ("weight", "bias")]
    out = step.model.head.T[None] if good else torch.stack([raw[f"{h}.1.weight"] for h in range(3)])
    drafter = MedusaDrafter(MedusaHeads([stacks[0] / 9], [stacks[1][:, None]], out, 3))
    engine = Engine(
        step, blocks=blocks, drafter=drafter, draft_tokens=levels, prefix_cache=prefix_cache
    )
    for _ in range(2):  # the second time the prefix cache has the prompts
        assert answers(engine, wanted, params) == plain
    assert engine.metrics.drafted_tokens > 0
    assert not drafter._rows


def test_right_heads_are_taken_and_save_steps() -> None:
    model, follows = chain_model()
    step = FakeStep(model, max_tokens=64, max_rows=64, features="final")
    out, ahead = [], follows
    for _ in range(3):
        ahead = [follows[token] for token in ahead]
        out.append(readout(model, ahead).T)
    zero = torch.zeros(3, HIDDEN, HIDDEN), torch.zeros(3, 1, HIDDEN)
    drafter = MedusaDrafter(MedusaHeads([zero[0]], [zero[1]], torch.stack(out), 3))
    assert drafter.longest == 3 and drafter.nodes(3) == 19
    params = SamplingParams(max_tokens=21)
    engine = steps_of(step, drafter, params, draft_tokens=3)
    # One step for the prompt, then four tokens a step.
    assert engine.metrics.accepted_tokens == 15 and engine.metrics.steps == 6
    alone = Engine(step, blocks=200)
    assert answers(alone, [[1, 2, 3]], [params]) == answers(engine, [[1, 2, 3]], [params])
    assert alone.metrics.steps == 21


def test_a_tree_holds_the_best_ranks_of_each_head(tmp_path: Path) -> None:
    raw = tensors()
    step = FakeStep(features="final")
    drafter = open_medusa(folder_of(tmp_path, raw), step)
    rows = torch.randn(2, HIDDEN)
    logits = drafter.heads.logits(rows)
    for head in range(3):
        for i, row in enumerate(rows):
            torch.testing.assert_close(
                logits[head, i], plain_logits(raw, row, head), atol=1e-4, rtol=1e-4
            )
    sequence = type("Stub", (), {"tokens": [1, 2, 3, 4]})()
    assert drafter.propose([sequence], [3]) == [None]
    drafter.observe(sequence, 2, rows[:1])
    (found,) = drafter.propose([sequence], [3])
    assert found is not None and found.parents is not None and found.q is None
    paths, _ = drafter._trees[3]
    assert set(paths) == {p for p in CHOICES if len(p) <= 3}
    best = [plain_logits(raw, rows[0], head).argsort(descending=True) for head in range(3)]
    assert found.tokens == [int(best[len(p) - 1][p[-1]]) for p in paths]
    for node, path in enumerate(paths):
        parent = found.parents[node]
        assert parent < node
        assert (paths[parent] if parent >= 0 else ()) == path[:-1]
    (shorter,) = drafter.propose([sequence], [1])
    assert shorter is not None and shorter.tokens == best[0][:6].tolist()
    sequence.tokens.append(5)  # a token we have no row for
    assert drafter.propose([sequence], [3]) == [None]


def test_heads_share_the_models_output_layer(tmp_path: Path) -> None:
    raw = tensors(layers=2, shared=True)
    step = FakeStep(features="final")
    drafter = open_drafter(f"medusa:{folder_of(tmp_path, raw, layers=2)}", step, None)
    assert isinstance(drafter, MedusaDrafter)
    torch.testing.assert_close(drafter.heads.out[0], step.model.head.T)
    assert drafter.heads.logits(torch.randn(4, HIDDEN)).shape == (3, 4, 97)
    assert step.features is not None
    step.weights.clear()
    with pytest.raises(UserError, match="has no head of its own, and this artifact's is not"):
        open_medusa(tmp_path, step)


def test_a_file_of_torch_and_choices_of_ones_own(tmp_path: Path) -> None:
    raw = tensors()
    folder_of(tmp_path, raw, medusa_choices=[[0], [0, 0], [1]])
    (tmp_path / "medusa_lm_head.safetensors").unlink()
    torch.save(raw, tmp_path / "medusa_lm_head.pt")
    drafter = open_medusa(tmp_path, FakeStep(features="final"))
    assert drafter.longest == 2 and drafter.nodes(1) == 2 and drafter.nodes(2) == 3


def without(raw: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in raw.items() if key != name}


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("/nonexistent/smelt", "w"))


@pytest.mark.parametrize(
    ("raw", "config", "said"),
    [
        (without(tensors(), "1.0.linear.bias"), {}, "there is no weight 1.0.linear.bias"),
        (without(tensors(), "2.1.weight"), {}, "there is no weight 2.1.weight"),
        (tensors(vocab=96), {}, "has another vocabulary: 96 tokens, not 97"),
        (tensors() | {"1.0.linear.weight": torch.zeros(3, 4)}, {}, r"is \[3, 4\], not \[32, 32\]"),
        (tensors() | {"0.1.weight": torch.zeros(())}, {}, "there is no weight 0.1.weight"),
        (tensors(), {"medusa_num_heads": 0}, "medusa_num_heads is 0"),
        (tensors(), {"medusa_num_layers": "1"}, "medusa_num_layers is '1'"),
        (tensors(), {"medusa_num_heads": 9}, "there is no weight 3.0.linear.weight"),
        (tensors(), {"medusa_choices": [[0, 1]]}, "without its parent"),
        (tensors(), {"medusa_choices": [[-1]]}, "no list of paths"),
        (tensors(), {"medusa_choices": 3}, "no list of paths"),
    ],
)
def test_what_does_not_fit_is_one_line(
    tmp_path: Path, raw: dict[str, torch.Tensor], config: dict[str, Any], said: str
) -> None:
    folder = folder_of(tmp_path, raw, **config)
    with pytest.raises(UserError, match=said) as caught:
        open_medusa(folder, FakeStep(features="final"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a zip", pickle.dumps({"0": Evil()}, 2)])
def test_a_pickle_is_never_run(tmp_path: Path, content: bytes) -> None:
    folder = folder_of(tmp_path, {"0": torch.zeros(1)})
    (folder / "medusa_lm_head.safetensors").unlink()
    (folder / "medusa_lm_head.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"medusa_lm_head.pt holds no plain tensors") as caught:
        open_medusa(folder, FakeStep(features="final"))
    assert "\n" not in str(caught.value)


def test_folders_and_artifacts_that_have_nothing(tmp_path: Path) -> None:
    step = FakeStep(features="final")
    with pytest.raises(UserError, match=r"there is no config.json"):
        open_medusa(tmp_path, step)
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(UserError, match="is damaged"):
        open_medusa(tmp_path, step)
    (tmp_path / "config.json").write_text('{"medusa_num_heads": 1, "medusa_num_layers": 1}')
    with pytest.raises(UserError, match=r"there is no medusa_lm_head.safetensors and no"):
        open_medusa(tmp_path, step)
    with pytest.raises(UserError, match="is no folder of heads"):
        open_drafter("medusa:/nowhere", step, None)
    folder_of(tmp_path, tensors())
    for other, said in ((FakeStep(), "has no features"), (FakeStep(features="eagle3"), "eagle3")):
        with pytest.raises(UserError, match=rf"{said}.*compile the model with --features final"):
            open_medusa(tmp_path, other)
        with pytest.raises(UserError, match=r"--draft medusa: this artifact has .*final"):
            Engine(other, blocks=64, drafter=open_medusa(tmp_path, step))


def test_heads_of_nonsense_only_cost_time() -> None:
    step = FakeStep(FakeModel(), max_tokens=64, max_rows=64, features="final")
    shape = torch.full((2, HIDDEN, HIDDEN), float("nan")), torch.zeros(2, 1, HIDDEN)
    out = torch.full((1, 97, HIDDEN), float("nan"))
    drafter = MedusaDrafter(MedusaHeads([shape[0]], [shape[1]], out, 2))
    params = SamplingParams(max_tokens=12)
    engine = steps_of(step, drafter, params, draft_tokens=2)
    plain = Engine(step, blocks=200)
    assert answers(engine, [[7, 8]], [params]) == answers(plain, [[7, 8]], [params])


def test_a_wide_tree_is_charged_for_all_its_nodes() -> None:
    """With the same acceptance a chain pays and a tree of ten nodes a level does not."""
    chosen = []
    for nodes in (1, 10):
        length = DraftLength(longest=3, nodes=lambda levels, n=nodes: n * levels)
        for levels in (0, 1, 2, 3):
            length.stepped(1 + nodes * levels, 1 + 0.2 * nodes * levels)
        length.verified(10, 6)
        chosen.append(length.choose(1))
    assert chosen[0] > 0 and chosen[1] == 0
    assert DraftLength(8, longest=3).choose(1) == 3

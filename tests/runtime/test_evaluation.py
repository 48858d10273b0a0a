"""Evaluation: how a text is cut into windows, what is scored, and the numbers that come out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers.fake_artifact import VOCAB, write_tokenizer
from helpers.fake_step import (
    FakeModel,
    FakeStep,
    one_thread,  # noqa: F401  (autouse fixture)
)

from smelt.runtime.errors import UserError
from smelt.runtime.evaluation import Text, evaluate, prepare, read_text
from smelt.runtime.tokenizer import Tokenizer

TEXT = "The quick brown fox, naïve and süß, jumps over 12 lazy dogs: 狐狸跳过懒狗. 🦊 End.\n" * 3
BOS = 256


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The same vocabulary without BOS before a text."""
    import json

    folder = tmp_path_factory.mktemp("plain")
    write_tokenizer(folder)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    data["post_processor"] = None
    path.write_text(json.dumps(data))
    return Tokenizer(folder)


def scored(text: Text) -> list[int]:
    return [t for window in text.windows for t in window.tokens[window.first :]]


@pytest.mark.parametrize(("ctx", "stride"), [(None, None), (32, None), (32, 31), (32, 5), (2, 1)])
def test_with_bos_every_token_is_scored_once(
    tokenizer: Tokenizer, ctx: int | None, stride: int | None
) -> None:
    text = prepare(TEXT, tokenizer, context=64, ctx=ctx, stride=stride)
    assert scored(text) == tokenizer.encode(TEXT, False)
    assert text.tokens == text.scored_bytes == len(TEXT.encode())
    for window in text.windows:
        assert window.tokens[0] == BOS
        assert len(window.tokens) <= (ctx or 64)
        assert window.first >= 1


def test_without_bos_what_has_no_context_is_not_scored(plain: Tokenizer) -> None:
    ids = plain.encode(TEXT)
    overlapping = prepare(TEXT, plain, context=64)
    assert scored(overlapping) == ids[1:]
    disjoint = prepare(TEXT, plain, context=64, stride=64)
    assert scored(disjoint) == [t for i, t in enumerate(ids) if i % 64]
    assert "no BOS" in disjoint.protocol
    assert overlapping.scored_bytes == len(TEXT.encode()) - 1


def test_max_tokens_keeps_the_beginning(tokenizer: Tokenizer) -> None:
    text = prepare(TEXT, tokenizer, context=64, max_tokens=70)
    assert scored(text) == tokenizer.encode(TEXT, False)[:70]


def test_numbers_equal_a_direct_computation(tokenizer: Tokenizer) -> None:
    step = FakeStep(FakeModel(VOCAB))
    other = FakeStep(FakeModel(VOCAB, seed=1))
    text = prepare(TEXT, tokenizer, context=32)
    nll = original = kl = agree = 0.0
    for window in text.windows:
        tokens = list(window.tokens)
        rows = slice(window.first - 1, len(tokens) - 1)
        wanted = torch.tensor(tokens[window.first :])
        log_q = step.oracle(tokens)[rows].double().log_softmax(-1)
        log_p = other.oracle(tokens)[rows].double().log_softmax(-1)
        nll -= log_q.gather(1, wanted[:, None]).sum().item()
        original -= log_p.gather(1, wanted[:, None]).sum().item()
        kl += torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
        agree += (log_q.argmax(-1) == log_p.argmax(-1)).sum().item()
    steps: list[tuple[int, int]] = []
    found = evaluate(
        text,
        lambda windows: [step.oracle(w) for w in windows],
        lambda windows: [other.oracle(w) for w in windows],
        lambda done, total: steps.append((done, total)),
    )
    count = len(TEXT.encode())
    assert found.tokens == count
    assert found.perplexity == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert found.perplexity_original == pytest.approx(math.exp(original / count), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nll / math.log(2) / count, rel=1e-5)
    assert found.kl == pytest.approx(kl / count, rel=1e-4)
    assert found.top1_agreement == agree / count
    assert steps[-1] == (len(text.windows), len(text.windows))


def test_a_model_equals_itself(tokenizer: Tokenizer) -> None:
    step = FakeStep(FakeModel(VOCAB))
    text = prepare(TEXT, tokenizer, context=32, max_tokens=60)

    def score(windows: list[list[int]]) -> list[torch.Tensor]:
        return [step.oracle(window) for window in windows]

    found = evaluate(text, score, score)
    assert found.kl == 0.0
    assert found.top1_agreement == 1.0
    assert found.perplexity_original == found.perplexity
    alone = evaluate(text, score)
    assert set(alone.to_json()) == {"tokens", "perplexity", "bits_per_byte", "protocol"}


def test_impossible_tokens_never_make_kl_nan(tokenizer: Tokenizer) -> None:
    text = prepare(TEXT, tokenizer, context=32, max_tokens=40)

    def masked(windows: list[list[int]]) -> list[torch.Tensor]:
        logits = [torch.zeros(len(window), VOCAB) for window in windows]
        for one in logits:
            one[:, -1] = -math.inf
        return logits

    def even(windows: list[list[int]]) -> list[torch.Tensor]:
        return [torch.zeros(len(window), VOCAB) for window in windows]

    assert evaluate(text, masked, masked).kl == 0.0
    assert evaluate(text, even, masked).kl == pytest.approx(math.log(VOCAB / (VOCAB - 1)), rel=1e-3)
    assert evaluate(text, masked, even).kl == math.inf


def test_nan_logits_are_an_error(tokenizer: Tokenizer) -> None:
    text = prepare(TEXT, tokenizer, context=32, max_tokens=40)
    with pytest.raises(UserError, match="hold NaN"):
        evaluate(text, lambda windows: [torch.full((len(w), VOCAB), math.nan) for w in windows])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ctx": 65}, "--ctx is 65"),
        ({"ctx": 1}, "--ctx is 1"),
        ({"stride": 0}, "--stride is 0"),
        ({"ctx": 16, "stride": 16}, "at most 15"),
        ({"max_tokens": 1}, "--max-tokens is 1"),
    ],
)
def test_sizes_that_do_not_fit(tokenizer: Tokenizer, options: dict[str, int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        prepare(TEXT, tokenizer, context=64, **options)


def test_short_and_unreadable_texts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too few to score"):
        prepare("a", tokenizer, context=64)
    with pytest.raises(UserError, match="no file"):
        read_text(tmp_path / "absent.txt")
    with pytest.raises(UserError, match="cannot be read"):
        read_text(tmp_path)
    file = tmp_path / "latin.txt"
    file.write_bytes("schön".encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8 \\(byte 3 is 0xf6\\)"):
        read_text(file)

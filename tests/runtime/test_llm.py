"""The library's front over a fake artifact: texts, streams, chats, errors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.fake_artifact import EOS, FakeArtifact, fake_artifact
from helpers.fake_step import one_thread  # noqa: F401  (autouse fixture)

import smelt
from smelt.runtime.llm import LLM, load
from smelt.runtime.outputs import Completion
from smelt.runtime.sampling_params import SamplingParams

MAKE = Callable[..., LLM]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MAKE:
    """Loads a fake artifact; keywords as `fake_artifact` takes them."""

    def make(**options: int) -> LLM:
        artifact = fake_artifact(tmp_path / "OUT", **options)
        opened: Callable[[Path], FakeArtifact] = lambda path: artifact  # noqa: E731
        module = SimpleNamespace(open_artifact=opened)
        monkeypatch.setitem(sys.modules, "smelt.runtime.artifact", module)
        return load(artifact.folder, kv_cache_tokens=2000)

    return make


def program(llm: LLM) -> FakeArtifact:
    assert llm.artifact is not None
    return llm.artifact  # type: ignore[return-value]


def test_generate_answers_in_order(make: MAKE) -> None:
    llm = make()
    prompts = ["one", "a second, longer prompt", "three"]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=12))
    step = program(llm).program
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = llm.tokenizer.encode(prompt)
        expected = step.greedy(ids, 12)
        if EOS in expected:
            expected = expected[: expected.index(EOS) + 1]
        assert output.token_ids == expected
        assert output.text == llm.tokenizer.decode(expected)
        assert output.prompt_tokens == len(ids)
        assert output.finish_reason in ("stop", "length")
        assert output.ttft_s > 0
        assert output.decode_tokens_per_s > 0
        assert output.error is None


def test_prompt_forms(make: MAKE) -> None:
    llm = make()
    ids = llm.tokenizer.encode("abc")
    params = SamplingParams(max_tokens=4)
    by_text = llm.generate("abc", params)[0].token_ids
    assert llm.generate(ids, params)[0].token_ids == by_text
    assert llm.generate([ids, "abc"], [params, params])[1].token_ids == by_text
    assert llm.generate([], params) == []
    assert llm.generate("", params)[0].prompt_tokens == 1
    with pytest.raises(smelt.UserError, match="2 prompts but 1"):
        llm.generate(["a", "b"], [params])


def test_an_error_of_one_prompt_is_its_own(make: MAKE) -> None:
    llm = make(max_position=16)
    params = SamplingParams(max_tokens=2)
    long, fine = llm.generate(["x" * 40, "fine"], params)
    assert long.error is not None and "41 tokens" in long.error and "16" in long.error
    assert long.finish_reason == "error" and not long.token_ids
    assert fine.error is None and len(fine.token_ids) == 2
    with pytest.raises(smelt.UserError, match=r"41 tokens.*16"):
        llm.generate(["x" * 40])
    assert not llm.engine.has_work
    llm.engine.scheduler.cache.clear()
    assert llm.engine.memory.free == llm.engine.metrics.blocks


def test_stream_gives_the_same_text(make: MAKE) -> None:
    llm = make()
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=5)
    whole = llm.generate("Hello", params)[0]
    stream = llm.stream("Hello", params)
    pieces = list(stream)
    assert "".join(pieces) == whole.text == stream.output.text
    assert len(pieces) > 5
    assert stream.output.finish_reason == whole.finish_reason


def test_streams_interleave_and_can_be_left(make: MAKE) -> None:
    llm = make()
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    alone = [llm.generate(p, params)[0].text for p in ("ab", "cd")]
    first, second = llm.stream("ab", params), llm.stream("cd", params)
    texts = ["", ""]
    for a, b in zip(first, second, strict=False):
        texts[0] += a
        texts[1] += b
    texts[0] += "".join(first)
    texts[1] += "".join(second)
    assert texts == alone
    with llm.stream("ab", params) as third:
        next(third)
    assert third.output.finish_reason == "abort"
    fourth = llm.stream("ab", params)
    next(fourth)
    del fourth
    llm.generate("x", params)
    assert not llm.engine.has_work


def test_stop_strings(make: MAKE) -> None:
    llm = make()
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=1, ignore_eos=True)
    text = llm.generate("Hello", params)[0].text
    stop = text[7:10]
    output = llm.generate(
        "Hello",
        SamplingParams(max_tokens=30, temperature=1.0, seed=1, ignore_eos=True, stop=stop),
    )[0]
    assert output.text == text[: text.index(stop)]
    assert output.finish_reason == "stop"


def test_logits_equal_the_oracle(make: MAKE) -> None:
    llm = make()
    prompts = [[256, 3, 4], [5] * 70]
    for prompt, logits in zip(prompts, llm.logits(prompts), strict=True):
        torch.testing.assert_close(logits, program(llm).program.oracle(prompt))


def test_chat_uses_the_template(make: MAKE) -> None:
    llm = make()
    prompt = llm.chat_prompt([{"role": "user", "content": "hi"}])
    assert llm.tokenizer.decode(prompt, False) == "<|bos|><|user|>hi<|eos|><|assistant|>"
    output = llm.chat([{"role": "user", "content": "hi"}], SamplingParams(max_tokens=5))
    assert output.prompt_tokens == len(prompt)
    assert output.token_ids == llm.generate(prompt, SamplingParams(max_tokens=5))[0].token_ids


def test_a_failed_step_is_an_error_in_words(make: MAKE, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make()

    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(program(llm).program, "run", broken)
    with pytest.raises(smelt.SmeltError, match="no such kernel"):
        llm.generate("a")
    with pytest.raises(smelt.SmeltError, match="no such kernel"):
        list(llm.stream("a"))


def test_a_closed_llm_says_so(make: MAKE) -> None:
    with make() as llm:
        llm.generate("a", SamplingParams(max_tokens=1))
    with pytest.raises(smelt.UserError, match="closed"):
        llm.generate("a")


def test_public_names() -> None:
    assert callable(smelt.load)
    assert smelt.LLM is LLM
    assert smelt.SamplingParams is SamplingParams
    assert {"compile", "Pass", "Engine", "Artifact"} <= set(dir(smelt))
    with pytest.raises(AttributeError):
        smelt.nothing  # noqa: B018


def test_the_best_of_several_answers_are_returned(make: MAKE) -> None:
    llm = make()
    params = SamplingParams(max_tokens=6, temperature=1.2, seed=4, ignore_eos=True, logprobs=0)
    many = llm.generate("Hello", replace(params, n=6))[0]
    assert [completion.index for completion in many.outputs] == list(range(6))
    assert many.text == many.outputs[0].text

    def mean(completion: Completion) -> float:
        assert completion.cumulative_logprob is not None
        return completion.cumulative_logprob / len(completion.token_ids)

    best = sorted(many.outputs, key=mean, reverse=True)[:2]
    found = llm.generate("Hello", replace(params, n=2, best_of=6, logprobs=None))[0]
    assert [c.token_ids for c in found.outputs] == [c.token_ids for c in best]
    assert all(c.logprobs is None for c in found.outputs)
    with pytest.raises(smelt.UserError, match="one answer"):
        llm.stream("Hello", replace(params, n=2))


def test_requests_are_taken_as_they_are_answered(make: MAKE) -> None:
    llm = make()
    taken = []

    def source() -> Iterator[tuple[int, str, SamplingParams]]:
        for number in range(20):
            taken.append(number)
            yield number, f"prompt {number}", SamplingParams(max_tokens=1 + number % 5)

    found = {}
    for number, output in llm.run(source(), in_flight=4):
        assert len(taken) - len(found) <= 4
        found[number] = output.token_ids
    assert found.keys() == set(range(20))
    assert found[7] == llm.generate("prompt 7", SamplingParams(max_tokens=3))[0].token_ids


def test_requests_behind_many_that_cannot_run_are_answered(make: MAKE) -> None:
    llm = make(max_position=16)
    params = SamplingParams(max_tokens=2)
    wanted = [(i, "x" * 40 if i < 9 else "fine", params) for i in range(11)]
    found = dict(llm.run(wanted, in_flight=2))
    assert [found[i].error is None for i in range(11)] == [False] * 9 + [True] * 2

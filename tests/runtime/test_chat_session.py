"""Multi-turn chat: the cache of earlier turns is used, and a full context drops the oldest."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.fake_artifact import TEMPLATE, fake_artifact
from helpers.fake_step import one_thread  # noqa: F401  (autouse fixture)

from smelt.runtime.chat_session import ChatSession
from smelt.runtime.errors import UserError
from smelt.runtime.llm import load
from smelt.runtime.sampling_params import SamplingParams

MAKE = Callable[..., ChatSession]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MAKE:
    def make(
        system: str | None = None,
        max_tokens: int | None = 8,
        template: str | None = TEMPLATE,
        **layout: int,
    ) -> ChatSession:
        artifact = fake_artifact(tmp_path / "OUT", template, **layout)
        module = SimpleNamespace(open_artifact=lambda path: artifact)
        monkeypatch.setitem(sys.modules, "smelt.runtime.artifact", module)
        llm = load(artifact.folder, kv_cache_tokens=2000)
        params = SamplingParams(max_tokens=max_tokens)
        return ChatSession(llm, system=system, params=params)

    return make


def say(session: ChatSession, text: str) -> str:
    return "".join(session.send(text))


def test_later_turns_compute_only_what_is_new(make: MAKE) -> None:
    session = make(system="You are a test. " * 5)
    fresh = []
    for text in ("Hello there", "And now?", "Go on."):
        answer = say(session, text)
        fresh.append(session.llm.chat([*history(session)[:-1]], session.params).text)
        assert answer == fresh[-1]
    stats = session.stats
    assert stats.turns == 3
    assert stats.reused_tokens > 2 * 80
    # Per later turn: the last answer token, end tags, the question: not the system message.
    assert stats.prefilled_tokens < 120 + 2 * 30


def history(session: ChatSession) -> list[dict[str, Any]]:
    system = [{"role": "system", "content": session.system}] if session.system else []
    return [*system, *session.messages]


def test_a_cancelled_answer_stays_in_the_conversation(make: MAKE) -> None:
    session = make(max_tokens=None)
    turn = session.send("Tell me")
    pieces = [next(turn), next(turn)]
    turn.cancel()
    pieces += list(turn)
    assert session.messages[-1] == {"role": "assistant", "content": "".join(pieces)}
    assert turn.output.finish_reason == "abort"
    say(session, "again")
    assert session.stats.turns == 2
    assert session.stats.reused_tokens > 5


def test_a_full_context_drops_the_oldest_turns(make: MAKE) -> None:
    session = make(system="sys", max_position=128)
    dropped = []
    for number in range(8):
        turn = session.send(f"message number {number}")
        list(turn)
        dropped.append(turn.dropped)
    assert dropped[0] == 0
    assert sum(dropped) > 0
    assert session.messages[0]["role"] == "user"
    assert session.messages[-2]["content"] == "message number 7"
    assert all(n % 2 == 0 for n in dropped)
    with pytest.raises(UserError, match="this message alone"):
        session.send("x" * 200)
    say(session, "still works")


def test_reset_system_save_and_load(make: MAKE, tmp_path: Path) -> None:
    session = make(system="first")
    say(session, "hello")
    path = tmp_path / "talk.json"
    session.save(path)
    messages = list(session.messages)
    session.reset()
    session.set_system("second")
    assert session.messages == []
    session.load(path)
    assert session.messages == messages
    assert session.system == "first"
    path.write_text('{"messages": 3}')
    with pytest.raises(UserError, match=r"talk\.json"):
        session.load(path)
    with pytest.raises(UserError, match="nowhere"):
        session.load(tmp_path / "nowhere.json")
    with pytest.raises(UserError, match="written"):
        session.save(tmp_path / "no" / "folder.json")
    assert session.messages == messages


def test_without_a_template_text_is_continued(make: MAKE) -> None:
    session = make(template=None)
    assert not session.templated
    first = say(session, "Once upon")
    prompt = session.llm.tokenizer.encode("Once upon" + first + " a time")
    turn = session.send(" a time")
    list(turn)
    assert turn.output.prompt_tokens == len(prompt)


def test_a_template_that_refuses_leaves_the_chat_usable(make: MAKE) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    session = make(system="s", template=template)
    with pytest.raises(UserError, match="no system"):
        session.send("hi")
    session.set_system(None)
    say(session, "hi")

"""Calibration text: what is read, how it is cut, and what each bad file is told."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.words import Words

from smelt.compiler.calibration_data import BUILTIN, Calibration, load_calibration
from smelt.runtime.errors import UserError


def load(path: Any, **options: Any) -> Calibration:
    return load_calibration(path, Words(), **{"samples": 4, "seqlen": 8, **options})


def text(words: int) -> str:
    return "\n".join(" ".join(f"word{i}" for i in range(j, j + 20)) for j in range(0, words, 20))


def test_builtin_text_gives_full_samples() -> None:
    found = load_calibration("builtin", Words(), samples=8, seqlen=64)
    assert len(found.token_lists) == 8 and {len(t) for t in found.token_lists} == {64}
    assert found.source == "builtin" and found.tokens == 512
    assert found.sha256 == hashlib.sha256(BUILTIN.read_bytes()).hexdigest()
    assert json.loads(json.dumps(found.to_json()))["samples"] == 8


def test_builtin_text_is_what_its_script_makes() -> None:
    spec = importlib.util.spec_from_file_location("make", BUILTIN.parent / "make.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert made.build() == BUILTIN.read_text(encoding="utf-8")
    assert 60_000 < BUILTIN.stat().st_size < 100_000


def test_a_model_folder_may_bring_its_own(tmp_path: Path) -> None:
    (tmp_path / "calibration.txt").write_text(text(200))
    found = load("builtin", model_folder=tmp_path)
    assert found.source == str(tmp_path / "calibration.txt")
    assert load("builtin", model_folder=tmp_path / "other").source == "builtin"


def test_text_file_is_seeded_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text(4000))
    one, two, other = load(path, seed=1), load(path, seed=1), load(path, seed=2)
    assert one == two and one.token_lists != other.token_lists
    assert one.tokens == 32
    assert any("documents not needed" in line for line in one.dropped)


def test_a_text_too_short_for_all_samples_says_how_many(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text(20))
    found = load(path)
    assert len(found.token_lists) == 2
    assert "2 of 4 samples asked for: the text is too short" in found.dropped
    assert "5 tokens after the last full sample" in found.dropped


def test_jsonl_of_texts_and_messages(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    chat = {"messages": [{"role": "user", "content": "hello there"}] * 4}
    path.write_text(json.dumps({"text": text(20)}) + "\n\n" + json.dumps(chat) + "\n")
    found = load(path, samples=9, seqlen=11)
    assert found.tokens == 33
    used = {token for tokens in found.token_lists for token in tokens}
    assert set(Words().encode("<user> hello word7", add_special_tokens=False)) <= used


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\n", "is empty"),
        ("a.txt", b"fine\nfine\n\xff\xfe broken", "not UTF-8 (line 3"),
        ("a.txt", b"only three words", "--calib-seqlen 4"),
        ("a.txt", "нет здесь ни одного знакомого слова совсем нет".encode() * 9, "language"),
        ("a.csv", b"text", "reads .txt"),
        ("a", b"text", "ends in nothing"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n[1]', "line 3 is a list"),
        ("a.jsonl", b'{"prompt": "a"}', "it has prompt"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', "role and content"),
    ],
)
def test_bad_files_are_told_what_is_wrong(
    tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load(path)
    assert expected in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no calibration file"):
        load(tmp_path / "nothing.txt")
    with pytest.raises(UserError, match="is a folder"):
        load(tmp_path)


def test_chat_files_need_a_template(tmp_path: Path) -> None:
    class Plain(Words):
        apply_chat_template = None  # type: ignore[assignment]

    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hi"}]}')
    with pytest.raises(UserError, match="chat template"):
        load_calibration(path, Plain(), samples=1, seqlen=2)


def test_numbers_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 1 sample"):
        load("builtin", samples=0)


def test_halves_of_characters_are_another_language(tmp_path: Path) -> None:
    class Bytes(Words):
        unk_token_id = None  # type: ignore[assignment]

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return list(text.encode())

        def decode(self, ids: list[int]) -> str:
            return bytes(ids).decode(errors="replace")

    path = tmp_path / "a.txt"
    path.write_text("学而时习之，不亦说乎" * 20, encoding="utf-8")
    with pytest.raises(UserError, match="language of the model"):
        load_calibration(path, Bytes(), samples=1, seqlen=8)
    path.write_text("naïve café " * 20, encoding="utf-8")
    assert load_calibration(path, Bytes(), samples=1, seqlen=8).tokens == 8


def test_real_vocabularies_know_the_builtin_text() -> None:
    from helpers.data import data_path
    from transformers import AutoTokenizer

    folder = data_path("tokenizers/gpt2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = load_calibration("builtin", tokenizer, samples=128, seqlen=512)
    assert found.tokens > 15_000

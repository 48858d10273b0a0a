"""Our reading of a tokenizer folder equals transformers' AutoTokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.data import ROOT, data_path
from helpers.fake_artifact import SPECIAL, write_tokenizer

from smelt.runtime.errors import SmeltError, UserError
from smelt.runtime.tokenizer import Tokenizer

TEXTS = (
    "Hello  world",
    "",
    " leading and trailing ",
    "你好 👋 naïve\n\n\ttabs",
    "<s> special </s> <|endoftext|> inside",
    "a" * 300,
)
FOLDERS = (
    "tokenizers/gpt2",
    "tokenizers/mistral_v1",
    "models/stories260K",
    "models/llama2xs270K",
    "models/babyllama361",
)


def compare(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer(folder)
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.vocab_size == len(theirs)
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids
        assert ours.encode(text, False) == theirs(text, add_special_tokens=False).input_ids
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", FOLDERS)
def test_equals_transformers_on_real_vocabularies(name: str) -> None:
    compare(data_path(name))


def test_equals_transformers_on_the_demo_model() -> None:
    folder = ROOT / "models" / "demo" / "smelt-demo"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("the demo model is not there yet")
    compare(folder)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"add_bos_token": False},
        {"add_eos_token": True},
        {"bos_token": {"content": "<|bos|>", "__type": "AddedToken"}},
        {"add_bos_token": True, "bos_token": None},
        {"additional_special_tokens": ["a", "<|user|>"]},
        {"extra_special_tokens": ["b"]},
    ],
)
def test_equals_transformers_in_special_tokens(tmp_path: Path, change: dict[str, Any]) -> None:
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    compare(tmp_path)


def test_special_tokens_are_left_out_of_text(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    ids = tokenizer.encode("<|user|>hi<|eos|>")
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.is_special(tokenizer.token_to_id(SPECIAL[3]) or 0)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("plain", "plain"),
        ([{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}], "d"),
        ({"default": "d", "tool_use": "t"}, "d"),
        (None, None),
    ],
)
def test_chat_template_of_the_configuration(
    tmp_path: Path, template: Any, expected: str | None
) -> None:
    write_tokenizer(tmp_path, template)
    found = Tokenizer(tmp_path).chat_template
    assert (found and found.source) == expected
    (tmp_path / "chat_template.jinja").write_text("from the file")
    found = Tokenizer(tmp_path).chat_template
    assert found is not None
    assert found.source == "from the file"


def test_what_is_wrong_with_a_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="not a tokenizer"):
        Tokenizer(tmp_path)
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(SmeltError, match="no JSON object"):
        Tokenizer(tmp_path)

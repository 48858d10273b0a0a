"""Calibration from Hugging Face datasets: local folders, and the hub as far as it works offline."""

from __future__ import annotations

import builtins
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest
from helpers.words import Words

from smelt.compiler.calibration_data import Calibration, load_calibration
from smelt.runtime.errors import UserError

TEXTS = [" ".join(f"word{i}x{j}" for j in range(5)) for i in range(40)]


def load(source: str, **options: Any) -> Calibration:
    return load_calibration(source, Words(), **{"samples": 4, "seqlen": 6, **options})


def write(folder: Path, rows: list[Any], name: str = "train.jsonl") -> str:
    """A dataset folder with these rows, as --calib names it."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"hf:{folder}"


def decoded(found: Calibration) -> set[int]:
    return {token for tokens in found.token_lists for token in tokens}


def test_a_folder_is_read_in_seeded_order_as_far_as_needed(tmp_path: Path) -> None:
    source = write(tmp_path / "set", [{"text": text, "extra": 1} for text in TEXTS])
    found, again, other = load(source), load(source), load(source, seed=1)
    assert found == again and found.token_lists != other.token_lists
    assert found.source == source and found.revision is None
    assert found.tokens == 24 and len(found) == 4
    assert found.dropped == ("rows after the first 4 not needed",)
    assert "revision" not in found.to_json()


def test_the_hash_is_of_the_text_that_was_taken(tmp_path: Path) -> None:
    rows = [{"text": text} for text in TEXTS[:3]]
    found = load(write(tmp_path / "one", rows), samples=3)
    order = [text for ids in found for text in TEXTS if Words().encode(text) == list(ids)]
    assert sorted(order) == sorted(TEXTS[:3])
    expected = hashlib.sha256("".join(f"{text}\0" for text in order).encode()).hexdigest()
    assert found.sha256 == expected
    changed = load(write(tmp_path / "one", [*rows[:2], {"text": TEXTS[5]}]), samples=3)
    assert changed.sha256 != found.sha256


def test_messages_go_through_the_template_and_empty_rows_are_counted(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "good"}]
    rows = [{"messages": chat, "text": None}, {"messages": None, "text": " "}] * 3
    found = load(write(tmp_path / "set", rows), samples=9, seqlen=5)
    expected = Words().encode("<user> hello there <assistant> good", add_special_tokens=False)
    assert decoded(found) == set(expected)
    assert "3 rows without text" in found.dropped
    assert "6 of 9 samples asked for: the text is too short" in found.dropped


def test_splits_configurations_and_saved_sets(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write(folder, [{"text": text} for text in TEXTS[:8]])
    write(folder, [{"text": text} for text in TEXTS[8:16]], "test.jsonl")
    test = decoded(load(f"hf:{folder}:test"))
    assert test.isdisjoint({*Words().encode(" ".join(TEXTS[:8]), False)})
    assert decoded(load(f"hf:{folder}:default:test")) == test
    saved = datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_dict({"text": TEXTS}),
            "few": datasets.Dataset.from_dict({"text": TEXTS[:4]}),
        }
    )
    saved.save_to_disk(tmp_path / "saved")
    assert len(load(f"hf:{tmp_path / 'saved'}")) == 4
    assert "tokens after" not in str(load(f"hf:{tmp_path / 'saved'}:few").dropped)
    saved["few"].save_to_disk(tmp_path / "single")
    assert load(f"hf:{tmp_path / 'single'}").sha256 == load(f"hf:{tmp_path / 'saved'}:few").sha256


@pytest.mark.parametrize(
    ("rows", "suffix", "words"),
    [
        ([{"prompt": "a", "answer": "b"}], "", ("row 1", "it has answer, prompt")),
        ([{"messages": [{"role": "user"}]}], "", ("row 1", "role and content")),
        ([{"text": " "}], "", ("holds 0 tokens",)),
        ([{"text": "a"}], ":valid", ("Available splits", "train")),
        ([{"text": "a"}], ":other:train", ("'other' not found", "check the name")),
        ([], "", ("the split is empty",)),
        ([{"text": "a"}], ":a:b:c", ("expected hf:NAME",)),
        ([{"text": "a"}], ":", ("expected hf:NAME",)),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, rows: list[Any], suffix: str, words: tuple[str, ...]
) -> None:
    source = write(tmp_path / "set", rows) + suffix
    with pytest.raises(UserError) as error:
        load(source)
    said = str(error.value)
    assert source in said and "\n" not in said
    assert all(word in said for word in words), said


def test_folders_without_data_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="any data files"):
        load(f"hf:{tmp_path}")
    (tmp_path / "train.jsonl").write_text('{"text": ')
    with pytest.raises(UserError, match="JSON"):
        load(f"hf:{tmp_path}")
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS})})
    saved.save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="no split test; it has train"):
        load(f"hf:{tmp_path / 'saved'}:test")


def test_without_the_library_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: Any, **more: Any) -> Any:
        if name == "datasets":
            raise ModuleNotFoundError("No module named 'datasets'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=r"pip install 'smelt\[datasets\]'"):
        load("hf:somebody/something")


def test_offline_the_hub_is_out_of_reach() -> None:
    """Unless the dataset is in the library's cache. Tests run with HF_HUB_OFFLINE."""
    with pytest.raises(UserError, match=r"hf:nobody/nothing.*Couldn't reach.*go online"):
        load("hf:nobody/nothing")


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A hub with one dataset, owner/known; the calls to `load_dataset` that were made."""
    calls: list[Any] = []

    def info(self: Any, name: str) -> Any:
        if name == "owner/known":
            return SimpleNamespace(sha="5f3a")
        if name == "owner/slow":
            raise TimeoutError("timed out")
        raise huggingface_hub.errors.HFValidationError(f"404: no {name}\nsecond line")

    def load_dataset(name: str, config: str | None, **options: Any) -> Any:
        calls.append((name, config, options))
        rows = datasets.Dataset.from_dict({"text": TEXTS})
        return rows.to_iterable_dataset() if options.get("streaming") else rows

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_a_dataset_of_the_hub_is_streamed_at_its_commit(online: list[Any]) -> None:
    found = load("hf:owner/known:conf:valid")
    assert online == [
        ("owner/known", "conf", {"split": "valid", "streaming": True, "revision": "5f3a"})
    ]
    assert found.revision == "5f3a" == found.to_json()["revision"]
    assert found.to_json()["source"] == "hf:owner/known:conf:valid"


@pytest.mark.parametrize(
    ("name", "words"),
    [("owner/unknown", "404: no owner/unknown second line; check"), ("owner/slow", "go online")],
)
def test_what_the_hub_says_is_one_line(online: list[Any], name: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        load(f"hf:{name}")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_offline_the_cache_of_the_library_is_used(
    online: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert load("hf:owner/known").revision is None
    assert online == [("owner/known", None, {"split": "train"})]

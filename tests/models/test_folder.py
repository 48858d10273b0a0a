"""How the user names a model: a folder, a hub name, or something that is neither."""

from __future__ import annotations

from pathlib import Path

import pytest

from smelt.models.folder import read_json, resolve
from smelt.runtime.errors import SmeltError, UserError


def test_a_folder_with_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert resolve(tmp_path / "model") == tmp_path / "model"
    monkeypatch.chdir(tmp_path)
    assert resolve("model") == tmp_path / "model"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/model") == tmp_path / "model"


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to("model")
    assert resolve(tmp_path / "link") == tmp_path / "model"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "no folder nowhere; name a model folder, or a hub model as OWNER/NAME"),
        ("./a/b", "no folder ./a/b"),
        ("/a/b", "no folder /a/b"),
        ("a/b/c", "no folder a/b/c"),
        ("a b/c?d", "it is not a hub name"),
    ],
)
def test_what_is_neither_folder_nor_hub_name(name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(name)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_a_config_and_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config.json; is it a Hugging Face model folder"):
        resolve(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is a file; name the folder that holds config.json"):
        resolve(tmp_path / "config.json")


def test_a_hub_name_offline_is_one_line() -> None:
    with pytest.raises(SmeltError) as caught:
        resolve("owner-of-nothing/model-of-nothing")
    text = str(caught.value)
    assert "no folder owner-of-nothing/model-of-nothing, and the hub cannot be reached" in text
    assert "go online, or name a local folder" in text and "\n" not in text
    assert not isinstance(caught.value, UserError)


@pytest.mark.parametrize("text", ["", "{", "[1]", "3"])
def test_json_that_is_no_object_names_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x.json"):
        read_json(tmp_path / "x.json")


def test_json_that_is_no_text_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match=r"x.json cannot be read as JSON"):
        read_json(tmp_path / "x.json")

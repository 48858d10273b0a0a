"""Building and loading the library: the cache, concurrent builds, and errors of one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from smelt.runtime.errors import SmeltError, UserError
from smelt.runtime.kernels import build

from .isa import available


def _script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SMELT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_a_failing_compiler_is_one_line(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "echo 'In file x.h' >&2; echo 'x.h:1: error: no such thing' >&2; echo more >&2; exit 1"
    monkeypatch.setenv("CXX", _script(empty_cache / "c++", text))
    with pytest.raises(SmeltError, match=r"x\.h:1: error: no such thing") as caught:
        build.library_path()
    assert "\n" not in str(caught.value)
    assert not list((empty_cache / "cache").rglob("*.so"))
    assert not list((empty_cache / "cache").rglob("build-*")), "left its folder behind"


def test_no_compiler_says_what_to_do(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(empty_cache))
    with pytest.raises(UserError, match="install g"):
        build.library_path()
    monkeypatch.setenv("CXX", str(empty_cache / "missing"))
    with pytest.raises(UserError, match="missing"):
        build.library_path()


def test_the_library_is_built_once(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that writes what it is asked for and counts its calls."""
    log = empty_cache / "calls"
    text = f'echo call >> {log}\nwhile [ "$1" != -o ]; do shift; done\necho library > "$2"'
    monkeypatch.setenv("CXX", _script(empty_cache / "c++", text))
    path = build.library_path()
    calls = log.read_text().count("call")
    assert path.read_text() == "library\n" and calls == len(build._units()) + 1
    assert build.library_path() == path
    assert log.read_text().count("call") == calls
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_two_builds_at_once(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'while [ "$1" != -o ]; do shift; done\nsleep 0.2\necho library > "$2"'
    monkeypatch.setenv("CXX", _script(empty_cache / "c++", text))
    code = "from smelt.runtime.kernels import build; print(build.library_path())"
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    paths = {process.communicate()[0].strip() for process in both}
    assert len(paths) == 1 and Path(paths.pop()).read_text() == "library\n"


@pytest.mark.parametrize("name", ("baseline", "nonsense"))
def test_the_environment_names_the_instruction_set(name: str) -> None:
    code = "from smelt.runtime.kernels import build; print(build.active_isa())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "SMELT_CPU_ISA": name},
        capture_output=True,
        text=True,
        check=True,
    )
    if name in available():
        assert done.stdout.strip() == name
    else:
        assert done.stdout.strip() == available()[-1]
        assert "SMELT_CPU_ISA=nonsense is not one of baseline" in done.stderr

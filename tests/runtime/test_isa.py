"""Instruction sets: what this machine has, what a compiler uses of it, and what is missing."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from smelt.runtime import isa


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """The machine is asked once a process; here each test asks again."""
    isa.available.cache_clear()
    yield
    isa.available.cache_clear()


def test_the_machine_is_system_and_processor() -> None:
    system, _, processor = isa.machine().partition("-")
    assert system == platform.system().lower() and processor == platform.machine().lower()


def test_the_kernels_list_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "processor\t: 0\nflags\t\t: fpu avx2 fma\nbugs\t: none\nflags\t: other\n"
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    assert isa.available() == {"fpu", "avx2", "fma"}


def test_on_arm_the_list_is_called_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: "Features\t: asimd bf16\n")
    assert isa.available() == {"asimd", "bf16"}
    assert isa.missing(["bf16", "sve"]) == ["sve"]


def absent(self: Path) -> str:
    raise FileNotFoundError(self)


def test_a_machine_that_does_not_tell_misses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", absent)
    assert isa.available() == frozenset()
    assert isa.missing(["avx512f"]) == []


def test_every_missing_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa, "available", lambda: frozenset({"avx2", "fma"}))
    assert isa.missing(["avx512f", "avx2", "amx_tile", "fma"]) == ["amx_tile", "avx512f"]


def test_what_native_code_uses_is_there() -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    used = isa.compiled_for("g++")
    assert isa.missing(used) == []
    if platform.machine() == "x86_64":
        assert used, "the compiler uses no instruction set that we know"


def test_a_compiler_is_asked_and_unknown_macros_are_ignored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer = "#define __AVX2__ 1\n#define __FMA__ 1\n#define __NEW__ 1\n\n"
    done = subprocess.CompletedProcess([], 0, stdout=answer)
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: done)
    assert isa.compiled_for("any") == ["avx2", "fma"]


def test_without_a_compiler_everything_known_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa, "available", lambda: frozenset({"avx2", "fma", "fpu"}))
    assert isa.compiled_for("/nowhere/g++") == ["avx2", "fma"]


def test_kernel_names_are_given_once() -> None:
    assert len(set(isa.MACROS.values())) == len(isa.MACROS)


def test_the_set_of_kernels_is_the_one_the_library_takes() -> None:
    from smelt.runtime.kernels import build

    assert isa.kernel_set() == build.active_isa()


def test_the_best_set_comes_last_and_another_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def flags(text: str) -> None:
        isa.available.cache_clear()
        monkeypatch.setattr(Path, "read_text", lambda self: f"flags\t: {text}\n")

    monkeypatch.delenv("SMELT_CPU_ISA", raising=False)
    flags("fpu avx2 fma")
    assert isa.kernel_set() == "baseline"
    flags("avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_bf16")
    assert isa.kernel_set() == "avx512"  # bf16 products are used with vnni only
    monkeypatch.setenv("SMELT_CPU_ISA", "avx2")
    assert isa.kernel_set() == "avx2"
    monkeypatch.setenv("SMELT_CPU_ISA", "avx512_vnni")
    assert isa.kernel_set() == "avx512"

"""benchmarks/gpu.py, which runs for minutes on a lent card: here on the CPU, with toy sizes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[4]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from benchmarks import gpu_process  # noqa: E402
from benchmarks.gpu_lines import Follower, Lines  # noqa: E402
from benchmarks.gpu_measure import error_of  # noqa: E402
from benchmarks.gpu_process import Crew, Task, Workplace  # noqa: E402
from benchmarks.gpu_profile import idle_share  # noqa: E402
from benchmarks.gpu_tables import failures, goals, tables  # noqa: E402

KERNELS = ("attention", "linears", "activations", "experts", "sampling")


def smoke(out: Path, *arguments: str) -> dict[str, Any]:
    """Run the benchmark as a person would; its record."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--smoke", "--out", str(out), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = json.loads(out.read_text())
    return record


def test_kernels_are_checked_and_timed(tmp_path: Path) -> None:
    timed = ("linears", "activations")
    sections = [a for name in ("checks", *timed) for a in ("--only", name)]
    record = smoke(tmp_path / "gpu.json", *sections, "--most", "1")
    assert record["card"]["copy_bytes_per_s"] > 0
    found = record["sections"]
    assert sorted(row["group"] for row in found["checks"]["rows"]) == sorted(KERNELS)
    assert all(row["ok"] for row in found["checks"]["rows"])
    for name in timed:
        (row,) = found[name]["rows"]
        assert row["ms"] > 0 and row["bound_ms"] > 0
        assert row["fraction_of_bound"] == row["bound_ms"] / row["ms"]
    assert found["linears"]["rows"][0]["goal"]["met"] is False
    assert found["linears"]["rows"][0]["peers"]["cublas_bf16"]["ms"] > 0
    assert found["activations"]["rows"][0]["peers"]["inductor"]["ms"] > 0


@pytest.mark.slow
def test_every_case_is_right_and_timed(tmp_path: Path) -> None:
    sections = [a for name in ("checks", *KERNELS) for a in ("--only", name)]
    record = smoke(tmp_path / "gpu.json", *sections, "--minutes", "14")
    assert len(record["sections"]["checks"]["rows"]) > 100
    for name in KERNELS:
        assert record["sections"][name]["rows"]
        for row in record["sections"][name]["rows"]:
            working = [peer for peer in row["peers"].values() if "ms" in peer]
            assert row["ms"] > 0 and (working or not row["peers"])


@pytest.mark.slow
def test_whole_models_run_beside_transformers(tmp_path: Path) -> None:
    record = smoke(tmp_path / "gpu.json", "--only", "models", "--minutes", "15")
    found = record["sections"]["models"]["rows"]
    ran = {(row["model"], row["contender"], row["what"], row["batch"]) for row in found}
    for what, batch in (("decode", 1), ("decode", 2), ("prefill", 1)):
        for contender in ("bf16", "int4", "fp8", "transformers"):
            assert ("llama-8b", contender, what, batch) in ran
        assert ("qwen3-4b", "int4", what, batch) in ran
    assert all(row["step_ms"] > 0 for row in found)


class Place(Workplace):
    """Workers that run a few lines of Python."""

    def __init__(self, folder: Path, code: str) -> None:
        self._folder, self._code, self.started = folder, code, 0

    def start(self, arguments: list[str]) -> gpu_process.Worker:
        self.started += 1
        log = self._folder / f"{self.started}.log"
        done = arguments[arguments.index("--done") + 1]
        begin = (
            "import json, os, sys, time; from pathlib import Path\n"
            "from benchmarks.gpu_lines import Lines\n"
            f"lines = Lines(Path({str(log.with_suffix('.lines'))!r})); done = {done}\n"
        )
        command = [sys.executable, "-S", "-c", begin + self._code]
        return gpu_process.Worker(command, ROOT, {}, log)


def run(folder: Path, code: str, seconds: float = 60.0, **how: Any) -> tuple[Task, Place]:
    place = Place(folder, code)
    data: dict[str, Any] = {"rows": [], "failed": [], "notes": {}}
    task = Task("work", ["work"], data, how.pop("silence", 60.0), **how)
    Crew([task], place, [], 1, lambda: None).finish(time.time() + seconds, "no time was left")
    return task, place


def test_a_process_that_dies_costs_one_row(tmp_path: Path) -> None:
    code = (
        "for name in 'abc':\n"
        "    if name in done: continue\n"
        "    lines.begin(name)\n"
        "    if name == 'b': print('oh'); sys.stdout.flush(); os._exit(7)\n"
        "    lines.row({'name': name})\n"
        "lines.end()\n"
    )
    task, place = run(tmp_path, code)
    assert [row["name"] for row in task.data["rows"]] == ["a", "c"]
    (failed,) = task.data["failed"]
    assert failed["name"] == "b" and "status 7" in failed["error"] and "oh" in failed["error"]
    assert place.started == 2


def test_a_process_that_hangs_is_stopped(tmp_path: Path) -> None:
    code = (
        "lines.begin('a'); lines.row({}); lines.begin('b')\n"
        "if 'b' not in done: time.sleep(600)\n"
        "lines.end()\n"
    )
    task, place = run(tmp_path, code, silence=3.0)
    assert place.started == 2 and task.ended
    (failed,) = task.data["failed"]
    assert failed["name"] == "b" and "silent for 3 s" in failed["error"]


def test_what_is_loaded_is_loaded_again_by_the_next_process(tmp_path: Path) -> None:
    code = (
        "lines.begin('load x'); assert not done or done == ['a'], done\n"
        "lines.begin('a')\n"
        "if 'a' not in done: os.kill(os.getpid(), 9)\n"
        "lines.end()\n"
    )
    task, _ = run(tmp_path, code)
    (failed,) = task.data["failed"]
    assert failed["name"] == "a" and "SIGKILL" in failed["error"]


def test_a_process_that_says_nothing_is_not_started_again(tmp_path: Path) -> None:
    task, place = run(tmp_path, "raise ValueError('no such card')")
    assert place.started == 1
    assert "no such card" in task.data["failed"][0]["error"]


def test_no_process_lives_longer_than_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_process, "GRACE", 0.5)
    task, place = run(tmp_path, "lines.begin('a'); time.sleep(600)", seconds=3.0)
    assert place.started == 1 and "no time was left" in task.data["failed"][0]["error"]


def test_tasks_that_never_began_are_said(tmp_path: Path) -> None:
    place = Place(tmp_path, "lines.begin('x'); lines.end()")
    data: dict[str, Any] = {"rows": [], "failed": [], "notes": {}}
    tasks = [Task(name, [name], data, 60.0) for name in ("first", "second")]
    Crew(tasks, place, [], 1, lambda: None).finish(time.time() - 1, "not compiled in time")
    assert place.started == 0
    assert [one["name"] for one in data["failed"]] == ["first", "second"]


def test_lines_are_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    follower = Follower(path)
    assert follower.new() == []
    lines = Lines(path)
    lines.begin("ä")
    assert follower.new() == [{"begin": "ä"}]
    with path.open("a") as file:
        file.write('{"row": ')
        file.flush()
        assert follower.new() == []
        file.write("{}}\n")
    assert follower.new() == [{"row": {}}]


def test_errors_of_results() -> None:
    x = torch.tensor([1.0, -1.0, float("nan")])
    assert error_of(x, x, False) == 0.0 and error_of(x, x, True) == 0.0
    assert error_of(x, x.nan_to_num(), False) == float("inf")
    assert error_of(x, x.nan_to_num(), True) == pytest.approx(1 / 3)
    assert error_of(torch.tensor([1.1, 1.0]), torch.ones(2), False) == pytest.approx(0.05)
    assert error_of((x, torch.ones(2)), (x, torch.tensor([1.0, 1.5])), True) == 0.5
    with pytest.raises(ValueError, match=r"\[3\].*\[2\]"):
        error_of(x, torch.ones(2), False)


def test_idle_share() -> None:
    assert idle_share([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0)]) == pytest.approx(2 / 6)
    assert idle_share([(4.0, 8.0)]) == 0.0


def test_the_tables_say_what_failed_and_which_goals_are_met() -> None:
    row = {"kernel": "k", "shape": "4 x 4", "ms": 0.002, "bound_ms": 0.001}
    row |= {"fraction_of_bound": 0.5, "peers": {"a": {"ms": 0.003}, "b": {"error": "not here"}}}
    goal = {"of": "bound", "least": 0.75, "found": 0.5, "met": False}
    model = {"model": "m", "layers": 8, "what": "decode", "batch": 1, "contender": "int4"}
    model |= {"step_ms": 1.5, "tokens_per_s": 667.0, "fraction_of_bound": 0.7}
    model["goals"] = {"host gap": {"found": 0.01, "wanted": 0.05, "met": True, "projected": True}}
    wrong = {"kernel": "k", "shape": "5 x 5", "ok": False, "error": 0.5, "limit": 0.02}
    record = {
        "date": "2026-01-01T00:00:00Z",
        "card": {"name": "NVIDIA H200", "copy_bytes_per_s": 4.2e12, "operations_per_s": {}},
        "sections": {
            "checks": {"rows": [{**wrong, "ok": True}, wrong], "failed": []},
            "linears": {"rows": [{**row, "goal": goal}], "failed": []},
            "models": {"rows": [model], "failed": [{"name": "x", "error": "a\nboom"}]},
            "sampling": {"rows": [], "failed": [], "skipped": "the time was spent"},
        },
    }
    text = tables(record)
    assert "1 of 2 cases agree" in text and "4.20 TB/s" in text
    assert "| k | 4 x 4 | 2.0 | 1.0 | 50 % | a 3.0 | 75 % of bound: missed |" in text
    assert "| m | 8 | decode | 1 | int4 | 1.500 | 667 | 70.0 % |" in text
    assert [line.startswith("goal") for line in goals(record)] == [True, True]
    assert [line.split()[0] for line in failures(record)] == ["WRONG", "FAILED", "SKIPPED"]
    assert "boom" in failures(record)[1]

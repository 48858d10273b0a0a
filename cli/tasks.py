"""`smelt eval --tasks`: the demo model's own questions, and tasks of lm-evaluation-harness."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smelt.runtime.errors import SmeltError, UserError

if TYPE_CHECKING:
    from smelt.runtime.llm import LLM

DEMO = "demo"
# Resamples for the standard errors that have no formula; the harness's 100,000 take minutes.
BOOTSTRAP = 1000


def names(tasks: str) -> list[str]:
    """The names of `--tasks`. Raises UserError where the harness is needed and not installed."""
    found = [name for name in tasks.split(",") if name]
    if not found:
        raise UserError("--tasks is empty: give demo, or names of lm-evaluation-harness")
    if found != [DEMO]:
        _need_harness(found)
    return found


def run(
    llm: LLM,
    tasks: list[str],
    task_path: Path | None,
    limit: int | None,
    num_fewshot: int | None,
    chat_template: bool,
) -> dict[str, Any]:
    """Results by task: accuracy by question kind for demo, metrics for tasks of the harness."""
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}: give 1 or more questions a task")
    results: dict[str, Any] = {}
    if DEMO in tasks:
        results[DEMO] = _demo(llm, limit)
    others = [name for name in tasks if name != DEMO]
    if others:
        results |= _run_harness(llm, others, task_path, limit, num_fewshot, chat_template)
    return results


def _demo(llm: LLM, limit: int | None) -> dict[str, Any]:
    from smelt.models.demo.evaluate import artifact_generate_fn, questions, task_accuracy

    most = limit or 64
    accuracy = task_accuracy(artifact_generate_fn(llm), most)
    return {
        "mean": sum(accuracy.values()) / len(accuracy),
        "questions": sum(map(len, questions(most).values())),
        "accuracy": accuracy,
    }


def _need_harness(tasks: list[str]) -> None:
    try:
        import smelt.lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError(f"--tasks {','.join(tasks)}: smelt's own task is demo; {error}") from error


def _run_harness(
    llm: LLM,
    names: Sequence[str],
    task_path: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = False,
) -> dict[str, dict[str, Any]]:
    """Metrics of harness tasks by task, groups included: {"hellaswag": {"acc": 0.41, ...}}.

    task_path: a folder with further task files. limit: questions a task. Raises UserError for
    names the harness does not know, and SmeltError for what happens inside it.
    """
    import lm_eval

    from smelt.lm_eval import SmeltLM

    manager = _manager(names, task_path)
    try:
        with redirect_stdout(sys.stderr):  # where the harness prints, results stay alone
            found = lm_eval.simple_evaluate(
                model=SmeltLM(llm),
                tasks=list(names),
                task_manager=manager,
                limit=limit,
                num_fewshot=num_fewshot,
                apply_chat_template=chat_template,
                log_samples=False,
                bootstrap_iters=BOOTSTRAP,
            )
    except SmeltError:
        raise
    except Exception as error:  # data sets, metrics and task files are programs of their authors
        first = str(error).strip().split("\n")[0]
        raise SmeltError(
            f"--tasks {','.join(names)}: the harness failed with {type(error).__name__}: {first}"
        ) from error
    return {name: _metrics(values) for name, values in found["results"].items()}


def _manager(names: Sequence[str], task_path: Path | None) -> Any:
    """Knows all tasks that are asked for; the harness's own 14,000 names are read if needed."""
    from lm_eval.tasks import TaskManager

    if task_path is not None and not task_path.is_dir():
        raise UserError(f"--task-path {task_path}: no such folder")
    for defaults in (False, True):
        if task_path is None and not defaults:
            continue
        manager = TaskManager(include_path=task_path, include_defaults=defaults)
        unknown = [name for name in names if name not in manager.all_tasks]
        if not unknown:
            return manager
    near = get_close_matches(unknown[0], [*manager.all_tasks, "demo"], 3)
    raise UserError(
        f"--tasks {unknown[0]}: no such task; "
        + (f"is it {' or '.join(near)}? " if near else "")
        + "demo is smelt's own, `lm_eval ls tasks` lists the harness's, --task-path adds yours"
    )


def _metrics(values: dict[str, Any]) -> dict[str, Any]:
    """ "acc,none": 0.5 -> "acc": 0.5; a filter other than none stays in the name."""
    return {
        key.removesuffix(",none"): value
        for key, value in values.items()
        if isinstance(value, int | float) and "," in key
    }


def report(results: dict[str, Any]) -> str:
    """The results as lines."""
    lines: list[str] = []
    for task, values in results.items():
        if task == DEMO:
            lines.append(f"task {task}: {values['questions']} held-out questions")
            lines += [f"  {name:<18} {100 * x:6.1f} %" for name, x in values["accuracy"].items()]
            lines.append(f"  {'mean':<18} {100 * values['mean']:6.1f} %")
        else:
            lines.append(f"task {task}")
            lines += [f"  {name:<18} {x:.4f}" for name, x in values.items()]
    return "\n".join(lines)

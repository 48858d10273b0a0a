"""The GPU benchmark's result as tables, and in single lines what failed and which goals are met."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

KERNEL_SECTIONS = ("attention", "linears", "activations", "experts", "sampling")


def tables(record: dict[str, Any]) -> str:
    """Markdown: the card, the checks, kernels, whole models."""
    sections = record["sections"]
    parts = [_card(record)]
    if "checks" in sections:
        parts.append(_checks(sections["checks"]))
    kernels = [row for name in KERNEL_SECTIONS for row in sections.get(name, {}).get("rows", ())]
    if kernels:
        parts.append(_kernels(kernels))
    models = sections.get("models", {}).get("rows", ())
    if models:
        parts.append(_models(models))
    return "\n\n".join(parts)


def _card(record: dict[str, Any]) -> str:
    card = record["card"]
    rates = card.get("operations_per_s", {})
    known = [f"{kind} {rate / 1e12:.0f}" for kind, rate in rates.items() if isinstance(rate, float)]
    versions = ", ".join(f"{name} {version}" for name, version in card.get("versions", {}).items())
    return (
        f"{card.get('name', 'CPU')}, {record['date'][:10]}, {versions}. A large copy moves "
        f"{card.get('copy_bytes_per_s', 0.0) / 1e12:.2f} TB/s; cuBLAS does "
        f"{', '.join(known) or 'nothing'} TFLOP/s on large squares."
    )


def _checks(section: dict[str, Any]) -> str:
    rows = section["rows"]
    right = sum(row["ok"] for row in rows)
    return (
        f"{right} of {len(rows)} cases agree with their references, {len(section['failed'])} did "
        "not run."
    )


def _kernels(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| kernel | shape | µs | bound, µs | of bound | peers, µs | goal |",
        "|---|---|---:|---:|---:|---|---|",
    ]
    for row in rows:
        peers = [
            f"{name} {1e3 * peer['ms']:.1f}" for name, peer in row["peers"].items() if "ms" in peer
        ]
        lines.append(
            f"| {row['kernel']} | {row['shape']} | {1e3 * row['ms']:.1f} "
            f"| {1e3 * row['bound_ms']:.1f} | {100 * row['fraction_of_bound']:.0f} % "
            f"| {', '.join(peers)} | {_goal(row.get('goal'))} |"
        )
    return "\n".join(lines)


def _goal(goal: dict[str, Any] | None) -> str:
    if goal is None:
        return ""
    wanted = f"{100 * goal['least']:.0f} % of {goal['of']}"
    return f"{wanted}: {_met(goal['met'])}"


def _met(met: bool | None) -> str:
    return "not measured" if met is None else "met" if met else "missed"


def _models(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | layers | what | batch | contender | ms | tokens/s | of bound | x transformers "
        "| host gap |",
        "|---|---:|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [row["model"], str(row["layers"]), row["what"], str(row["batch"]), row["contender"]]
        cells += [f"{row['step_ms']:.3f}", f"{row['tokens_per_s']:.0f}"]
        cells += [_percent(row.get("fraction_of_bound"))]
        times = row.get("times_transformers")
        cells += ["" if times is None else f"{times:.2f}", _percent(row.get("host_gap_share"))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def goals(record: dict[str, Any]) -> Iterator[str]:
    """A line for each goal, met or not."""
    sections = record["sections"]
    for name in KERNEL_SECTIONS:
        for row in sections.get(name, {}).get("rows", ()):
            goal = row.get("goal")
            if goal is not None:
                found = "?" if goal["found"] is None else f"{100 * goal['found']:.0f} %"
                yield f"goal {_goal(goal)}, {found}: {row['kernel']} {row['shape']}"
    for row in sections.get("models", {}).get("rows", ()):
        for what, goal in row.get("goals", {}).items():
            projected = ", projected to all layers" if goal["projected"] else ""
            yield (
                f"goal {what} {goal['wanted']}: {_met(goal['met'])}, {goal['found']:.3f}"
                f"{projected}: {row['model']} {row['contender']} at batch {row['batch']}"
            )


def failures(record: dict[str, Any]) -> list[str]:
    """A line for each thing that is wrong: results that differ, sections and rows that failed."""
    found = []
    for name, section in record["sections"].items():
        found += [
            f"WRONG {row['kernel']} {row['shape']}: error {row['error']:.2g}, limit {row['limit']}"
            for row in section["rows"]
            if row.get("ok") is False
        ]
        found += [f"FAILED {name}: {f['name']}: {_short(f['error'])}" for f in section["failed"]]
        if "skipped" in section:
            found.append(f"SKIPPED {name}: {section['skipped']}")
    return found


def _short(error: str) -> str:
    """The first line of an error and, of a process that died, the last."""
    first, *more = error.strip().splitlines() or ["?"]
    return f"{first} {more[-1].strip()}" if more else first

"""The table of linear layers that `smelt plan` and `smelt inspect` print, and how it is joined."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from smelt.runtime import isa

if TYPE_CHECKING:
    from rich.table import Table

# Columns where nobody's window is too narrow.
UNFOLDED = 400
# What a verdict says of a layer, beside its name.
_SAID = ("method", "format", "group_size", "alpha", "activations", "error_rtn", "error")


def joined(manifest: Any) -> list[dict[str, Any]]:
    """Every linear and layer of experts of an artifact: what its quantization pass said, and what
    computes it.

    layer, method, format, group_size, error_rtn, error, note (why less was done than asked);
    operator, provider, reason, limit (why nothing faster computes it). Absent where there is
    nothing to say. Empty for artifacts whose manifest names no weights beside its kernels.
    """
    notes = [note for record in manifest.passes for note in record.get("notes", [])]
    verdicts = {_base(note.get("weight", note["layer"])): note for note in notes if "layer" in note}
    found = []
    for kernel in manifest.providers:
        if "weight" not in kernel and not kernel["operator"].startswith("experts"):
            continue
        verdict = verdicts.get(_base(kernel.get("weight", kernel["where"])), {})
        # A head that shares the embedding's weight is better known by its own name.
        named = verdict.get("method", "none") != "none"
        row = {"layer": verdict["layer"] if named else kernel["where"], "format": "16 bit"}
        row |= {key: verdict[key] for key in _SAID if key in verdict}
        row |= {"note": verdict["reason"]} if "reason" in verdict else {}
        parts = ("operator", "provider", "reason", "limit")
        found.append({**row, **{key: kernel[key] for key in parts if key in kernel}})
    return found


def _base(weight: str) -> str:
    """The planned name of a linear's weight, whatever a pass made of it."""
    return weight.split("@")[0].removesuffix(".qweight")


def by_kind(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `joined` that are alike but for the number of their layer, as one.

    layers: the name with * for numbers; count; error_rtn and error: the largest of them.
    """
    errors = ("error_rtn", "error")
    alike: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        name = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row["layer"])
        same = {k: v for k, v in row.items() if k not in ("layer", "alpha", *errors)}
        key = (name, *same.items())
        kind = alike.setdefault(key, {"layers": name, "count": 0, **same})
        kind["count"] += 1
        for error in errors:
            if error in row:
                kind[error] = max(kind.get(error, 0.0), row[error])
    return list(alike.values())


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows of `by_kind`, of `joined`, or of a memory plan."""
    from rich.table import Table

    made = Table(box=None, padding=(0, 2, 0, 0))
    measured = any("error" in row for row in rows)
    for column in ("layer", "format", *(("error",) if measured else ()), "kernel", "why"):
        made.add_column(column, overflow="fold")
    for row in rows:
        name = row.get("layers") or row["layer"]
        count = f" ({row['count']})" if row.get("count", 1) > 1 else ""
        error = [_error(row)] if measured else []
        made.add_row(name + count, _format(row), *error, _kernel(row), _why(row))
    return made


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print `table` as wide as the terminal; into a file or a pipe no cell is folded."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = UNFOLDED
    console.print(table(rows))


def _format(row: Mapping[str, Any]) -> str:
    size = f" g{row['group_size']}" if row.get("group_size") else ""
    inputs = f", inputs {row['activations']}" if row.get("activations") else ""
    return f"{row['format']}{size}{inputs}"


def _error(row: Mapping[str, Any]) -> str:
    if "error" not in row:
        return ""
    before = f"{row['error_rtn']:.2g} -> " if "error_rtn" in row else ""
    return f"{before}{row['error']:.2g}"


def _kernel(row: Mapping[str, Any]) -> str:
    level = isa.kernel_set() if row["provider"] == "cpu" else None
    return f"{row['operator']}, {row['provider']}" + (f" {level}" if level else "")


def _why(row: Mapping[str, Any]) -> str:
    """Why less was done than asked, and why nothing faster runs."""
    return "; ".join(str(row[key]) for key in ("note", "limit") if row.get(key))

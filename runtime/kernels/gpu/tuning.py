"""Which tile sizes a kernel is compiled with: shipped tables, and what `smelt tune` found here.

A table is `tuned/<kernel>.json`: {"90": {"few/4096x4096": {"constants": {...}, "num_warps": 4,
"num_stages": 3}, "few": ...}}, by compute capability and shape class; capability 0 stands for the
interpreter. Classes are looked up from the most specific to the most general; a capability without
entries takes those of the nearest lower one. Nothing is ever tuned while requests wait.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from smelt.runtime.errors import SmeltError

SHIPPED = Path(__file__).parent / "tuned"


class TuningError(SmeltError):
    """A table of tile sizes is damaged, or has nothing for a shape."""


@dataclass(frozen=True)
class Config:
    """constants: a kernel's tile sizes by constexpr name."""

    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3

    def to_json(self) -> dict[str, Any]:
        """As a table holds it."""
        return {
            "constants": dict(self.constants),
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def capability(device: torch.device) -> int:
    """Compute capability as one number (90 for 9.0); 0 where kernels are interpreted."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


@dataclass(frozen=True)
class Trial:
    """A configuration that is tried for all shapes of a kernel, None to look on; asked: the shape
    classes it was chosen for."""

    kernel: str
    config: Config | None
    asked: set[str] = field(default_factory=set)


_trials: list[Trial] = []
_used: set[tuple[str, int, str]] = set()  # (kernel, capability, shape) of entries given out


@contextmanager
def trying(kernel: str, config: Config | None) -> Iterator[Trial]:
    """Let `choose` give `config` for `kernel`, whatever the tables say."""
    trial = Trial(kernel, config)
    _trials.append(trial)
    try:
        yield trial
    finally:
        _trials.remove(trial)


def user_table() -> Path:
    """Where `smelt tune` keeps what it found on this machine."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "smelt" / "tuned"


def choose(kernel: str, shapes: Sequence[str], found: int) -> Config:
    """The configuration of `kernel` on capability `found`.

    shapes: shape classes, the most specific first. Raises TuningError where no table has any.
    """
    for trial in _trials:
        if trial.kernel == kernel:
            trial.asked.add(shapes[0])
            if trial.config is not None:
                return trial.config
    for folder in (user_table(), SHIPPED):
        by_capability = _table(folder / f"{kernel}.json")
        nearest = [c for c in by_capability if c <= found]
        entries = by_capability[max(nearest)] if nearest else {}
        for shape in shapes:
            if shape in entries:
                _used.add((kernel, max(nearest), shape))
                return entries[shape]
    raise TuningError(
        f"{SHIPPED.name}/{kernel}.json has nothing for {' or '.join(shapes)} on capability {found}"
    )


def keep(kernel: str, found: int, shape: str, config: Config) -> Path:
    """Write an entry into the user's table and return the file. The others in it stay."""
    path = user_table() / f"{kernel}.json"
    table = {c: dict(entries) for c, entries in _table(path).items()}
    table.setdefault(found, {})[shape] = config
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    data = {str(c): {s: e.to_json() for s, e in entries.items()} for c, entries in table.items()}
    part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    forget()
    return path


def used() -> frozenset[tuple[str, int, str]]:
    """(kernel, capability, shape) of every entry that was chosen in this process."""
    return frozenset(_used)


def tables() -> dict[str, dict[int, dict[str, Config]]]:
    """Every shipped table: kernel to capability to shape class."""
    return {path.stem: _table(path) for path in sorted(SHIPPED.glob("*.json"))}


@cache
def _table(path: Path) -> dict[int, dict[str, Config]]:
    if not path.is_file():
        return {}
    try:
        return {
            int(capability): {shape: _config(entry) for shape, entry in entries.items()}
            for capability, entries in json.loads(path.read_text(encoding="utf-8")).items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise TuningError(
            f"{path} is no tuning table: {error}; delete it and run smelt tune again"
        ) from error


def _config(entry: Mapping[str, Any]) -> Config:
    constants = {
        str(name): value if isinstance(value, bool | str) else int(value)
        for name, value in entry["constants"].items()
    }
    return Config(constants, int(entry["num_warps"]), int(entry["num_stages"]))


def forget() -> None:
    """Read the tables anew: after `smelt tune` wrote one."""
    _table.cache_clear()

"""`Pass`: one graph transformation that says what it expects, what it did and what it promises."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch import fx

from smelt.runtime.errors import UserError

from .program import Dialect, Program, module_path


@dataclass(frozen=True)
class Exact:
    """The program's logits stay the same bit for bit in float32."""

    kind: ClassVar[str] = "exact"


@dataclass(frozen=True)
class Close:
    """Sums may be taken in another order: |difference| <= atol + rtol * |reference|."""

    atol: float = 1e-5
    rtol: float = 1e-4
    kind: ClassVar[str] = "close"


@dataclass(frozen=True)
class Lossy:
    """Information is dropped (quantization): mean KL divergence and top-1 agreement are bounded."""

    max_kl: float = 0.5
    min_top1: float = 0.5
    kind: ClassVar[str] = "lossy"


Numerics = Exact | Close | Lossy


@dataclass
class PassResult:
    """What one run did.

    matched: places the pass recognised; rewritten: places it changed; declined: (module path,
    reason) of each place that nearly matched and was left alone. notes: per-place facts for the
    report (per-layer quantization errors).
    """

    matched: int = 0
    rewritten: int = 0
    declined: list[tuple[str, str]] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)

    def decline(self, node: fx.Node, reason: str) -> None:
        self.declined.append((module_path(node) or node.name, reason))


@dataclass(frozen=True)
class NoOptions:
    """For passes without options."""


class Pass:
    """Base of every pass, shipped or third-party.

    A subclass sets the class attributes and implements `run`; its docstring shows the graph before
    and after, says when the rewrite is legal and why it pays. A pass logs nothing, reads no files
    and asks for no device.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    requires: ClassVar[Dialect] = Dialect.SEMANTIC
    produces: ClassVar[Dialect | None] = None
    after: ClassVar[tuple[str, ...]] = ()
    numerics: ClassVar[Numerics] = Exact()
    Options: ClassVar[type] = NoOptions

    def expect(self, program: Program) -> int | None:
        """How many matches this model must give, counted without the matcher; None: any number."""
        return None

    def run(self, program: Program, options: Any) -> PassResult:
        raise NotImplementedError

    @classmethod
    def options(cls, given: Mapping[str, Any]) -> Any:
        """The frozen options from a mapping. Raises UserError for an unknown key."""
        known = {f.name for f in fields(cls.Options)}
        for key in given:
            if key not in known:
                raise UserError(
                    f"pass {cls.name} has no option {key!r}; "
                    f"it knows {', '.join(sorted(known)) or 'none'}"
                )
        return cls.Options(**given)

    @classmethod
    def source_hash(cls) -> str:
        """sha256 of the class's source: a changed pass must not reuse a cached result."""
        try:
            text = inspect.getsource(cls)
        except OSError:
            text = cls.__qualname__
        return hashlib.sha256(text.encode()).hexdigest()[:16]

"""`WeightPlan`: how every weight of the graph is made from the checkpoint, as data.

A plan is an ordered list of steps over named tensors (load, cat, scale, quantize, ...). It is
JSON-serialisable, hashed into the cache key and replayable; nothing hides in closures or load
hooks. A name is written once: a pass that changes a weight adds a step with a fresh name and
points the graph at it. `materialize` streams: a tensor is dropped as soon as its last reader ran,
so the peak is a layer's worth and not the model.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from smelt.runtime.errors import SmeltError


class TensorSource(Protocol):
    """Where `load` steps read: a checkpoint, or a module's state."""

    def tensor(self, name: str) -> torch.Tensor: ...


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a planned tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


@dataclass(frozen=True)
class Step:
    """One operation of a plan: reads `inputs`, writes `outputs`, with JSON-able `args`."""

    op: str
    outputs: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    args: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "op": self.op,
            "outputs": list(self.outputs),
            "inputs": list(self.inputs),
            "args": dict(self.args),
        }


Operation = Callable[..., tuple[torch.Tensor, ...]]
OPERATIONS: dict[str, Operation] = {}


def operation(name: str) -> Callable[[Operation], Operation]:
    """Register a step's implementation: tensors in, tuple of tensors out, pure.

    Shapes of a step's outputs are found by running it on meta tensors, so an operation must be
    written with torch functions only.
    """

    def register(function: Operation) -> Operation:
        if name in OPERATIONS:
            raise ValueError(f"weight operation {name!r} is registered twice")
        OPERATIONS[name] = function
        return function

    return register


@operation("cast")
def _cast(x: torch.Tensor, *, dtype: str) -> tuple[torch.Tensor, ...]:
    return (x.to(getattr(torch, dtype)),)


@operation("cat")
def _cat(*parts: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
    return (torch.cat(parts, dim),)


@operation("stack")
def _stack(*parts: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
    return (torch.stack(parts, dim),)


@operation("transpose")
def _transpose(x: torch.Tensor, *, dim0: int, dim1: int) -> tuple[torch.Tensor, ...]:
    return (x.transpose(dim0, dim1).contiguous(),)


@operation("rows")
def _rows(x: torch.Tensor, *, start: int, stop: int) -> tuple[torch.Tensor, ...]:
    return (x[start:stop].contiguous(),)


@operation("chunk")
def _chunk(x: torch.Tensor, *, parts: int, dim: int) -> tuple[torch.Tensor, ...]:
    return tuple(part.contiguous() for part in x.chunk(parts, dim))


@operation("multiply_columns")
def _multiply_columns(weight: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """weight [N, K] * factor [K]: what a linear needs when its input was divided by factor."""
    return ((weight.float() * factor.float()).to(weight.dtype),)


@operation("divide_rows")
def _divide_rows(x: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """x [N, K] or [N] / factor [N] along the first dimension."""
    divisor = factor.float().reshape(-1, *([1] * (x.dim() - 1)))
    return ((x.float() / divisor).to(x.dtype),)


@operation("divide_offset")
def _divide_offset(
    x: torch.Tensor, factor: torch.Tensor, *, offset: float
) -> tuple[torch.Tensor, ...]:
    """(x + offset) / factor - offset: a norm weight stored minus its offset (Gemma)."""
    return (((x.float() + offset) / factor.float() - offset).to(x.dtype),)


class PlanError(SmeltError):
    """A weight plan does not fit the checkpoint or itself."""


@dataclass
class WeightPlan:
    """Ordered steps, the spec of every name they write, and tensors computed on the way (`put`)."""

    steps: list[Step] = field(default_factory=list)
    specs: dict[str, TensorSpec] = field(default_factory=dict)
    computed: dict[str, torch.Tensor] = field(default_factory=dict)

    def load(self, name: str, source: str, shape: Iterable[int], dtype: torch.dtype) -> str:
        """Read `source` from the checkpoint as `name`."""
        return self._write(
            Step("load", (name,), (), {"source": source}), [TensorSpec(tuple(shape), dtype)]
        )

    def put(self, name: str, value: torch.Tensor) -> str:
        """Add a tensor that was computed while compiling (a scale found by calibration)."""
        name = self.fresh(name)
        self.computed[name] = value.detach().contiguous()
        spec = TensorSpec(tuple(value.shape), value.dtype)
        return self._write(Step("put", (name,)), [spec])

    def add(
        self, op: str, outputs: Iterable[str], inputs: Iterable[str], **args: Any
    ) -> tuple[str, ...]:
        """Append a step; output names are made fresh. Returns the names written.

        Raises PlanError for an unknown operation or input.
        """
        if op not in OPERATIONS:
            raise PlanError(f"weight plan: unknown operation {op!r}, known: {sorted(OPERATIONS)}")
        inputs = tuple(inputs)
        for name in inputs:
            if name not in self.specs:
                raise PlanError(f"weight plan: step {op} reads {name!r}, which no step writes")
        metas = [
            torch.empty(self.specs[n].shape, dtype=self.specs[n].dtype, device="meta")
            for n in inputs
        ]
        results = OPERATIONS[op](*metas, **args)
        names = tuple(self.fresh(name) for name in outputs)
        if len(names) != len(results):
            raise PlanError(f"weight plan: {op} writes {len(results)} tensors, {len(names)} named")
        self._write(
            Step(op, names, inputs, args), [TensorSpec(tuple(r.shape), r.dtype) for r in results]
        )
        return names

    def fresh(self, name: str) -> str:
        """`name`, or `name@1`, `name@2`, ... if taken."""
        if name not in self.specs:
            return name
        base = name.split("@", 1)[0]
        count = 1
        while f"{base}@{count}" in self.specs:
            count += 1
        return f"{base}@{count}"

    def _write(self, step: Step, specs: list[TensorSpec]) -> str:
        for name, spec in zip(step.outputs, specs, strict=True):
            if name in self.specs:
                raise PlanError(f"weight plan: {name!r} is written twice")
            self.specs[name] = spec
        self.steps.append(step)
        return step.outputs[0]

    def producers(self) -> dict[str, Step]:
        return {name: step for step in self.steps for name in step.outputs}

    def needed(self, wanted: Iterable[str]) -> list[Step]:
        """The steps `wanted` depend on, in plan order."""
        wanted = set(wanted)
        live = set(wanted)
        kept: list[Step] = []
        for step in reversed(self.steps):
            if live & set(step.outputs):
                kept.append(step)
                live |= set(step.inputs)
        unknown = wanted - set(self.specs)
        if unknown:
            raise PlanError(f"weight plan: nothing writes {sorted(unknown)[0]!r}")
        return kept[::-1]

    def materialize(
        self, wanted: Iterable[str], source: TensorSource
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Run what `wanted` needs; yield each wanted tensor as soon as it exists."""
        wanted = set(wanted)
        steps = _by_demand(self.needed(wanted))
        readers = Counter(name for step in steps for name in step.inputs)
        values: dict[str, torch.Tensor] = {}
        for step in steps:
            for name, value in zip(step.outputs, self._run(step, values, source), strict=True):
                spec = self.specs[name]
                if tuple(value.shape) != spec.shape or value.dtype != spec.dtype:
                    raise PlanError(
                        f"weight {name}: planned {spec.shape} {spec.dtype}, "
                        f"got {tuple(value.shape)} {value.dtype}; is the checkpoint complete?"
                    )
                if name in wanted:
                    yield name, value
                if readers[name]:
                    values[name] = value
            for name in step.inputs:
                readers[name] -= 1
                if not readers[name]:
                    values.pop(name, None)

    def _run(
        self, step: Step, values: dict[str, torch.Tensor], source: TensorSource
    ) -> tuple[torch.Tensor, ...]:
        if step.op == "load":
            return (source.tensor(step.args["source"]),)
        if step.op == "put":
            return (self.computed[step.outputs[0]],)
        return OPERATIONS[step.op](*(values[name] for name in step.inputs), **step.args)

    def to_json(self) -> list[dict[str, Any]]:
        return [step.to_json() for step in self.steps]

    def digest(self) -> str:
        """sha256 over the steps and the computed tensors' bytes."""
        h = hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode())
        for name in sorted(self.computed):
            h.update(name.encode())
            flat = self.computed[name].contiguous().flatten()
            h.update(flat.view(torch.uint8).numpy().tobytes())
        return h.hexdigest()


def _by_demand(steps: list[Step]) -> list[Step]:
    """Reorder so that each step stands just before its first reader needs it: loads come late."""
    producer = {name: step for step in steps for name in step.outputs}
    placed: set[int] = set()
    order: list[Step] = []

    def place(step: Step) -> None:
        stack = [(step, False)]
        while stack:
            current, ready = stack.pop()
            if id(current) in placed:
                continue
            if ready:
                placed.add(id(current))
                order.append(current)
                continue
            stack.append((current, True))
            stack += [(producer[n], False) for n in reversed(current.inputs)]

    read = {name for step in steps for name in step.inputs}
    for step in steps:
        if not any(name in read for name in step.outputs):
            place(step)
    for step in steps:
        place(step)
    return order

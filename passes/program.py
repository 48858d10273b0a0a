"""`Program`: the one form that flows from the trace to the lowering, and all that passes transform.

A graph of ATen and smelt:: operators whose every input is a placeholder with a role, the
`WeightPlan` that makes its weights from the checkpoint, and the contract of its caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._guards import detect_fake_mode
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from smelt.runtime.batch import BatchLayout, CacheSpec

from .weights import WeightPlan


class Role(str, Enum):
    """What a graph input is."""

    TOKEN = "token"
    BATCH = "batch"
    WEIGHT = "weight"
    CACHE = "cache"


class Dialect(int, Enum):
    """How far a program has come; each level has a verifier (`passes/dialect.py`)."""

    ATEN = 0
    SEMANTIC = 1
    QUANTIZED = 2
    CACHED = 3
    LOWERED = 4


@dataclass(frozen=True)
class Input:
    """A placeholder's role; for a weight, the name in the plan it takes its value from."""

    role: Role
    name: str


@dataclass(frozen=True)
class Facts:
    """What is known of the model beside its graph; nothing here names a model family.

    module_counts: modules of the traced tree by kind ("attention", "rms_norm", "layer_norm",
    "linear", "gated_mlp", "experts"), counted from the modules and not by a matcher, so that a
    pass's expectation is independent of what it finds.
    """

    model_class: str
    dtype: str
    vocab_size: int
    max_position: int
    hidden_layers: int
    module_counts: Mapping[str, int] = field(default_factory=dict)


@dataclass
class Program:
    """Graph, inputs, weights and contract. Passes change it in place through the methods below."""

    module: fx.GraphModule
    inputs: dict[str, Input]
    weights: WeightPlan
    facts: Facts
    dialect: Dialect = Dialect.ATEN
    caches: CacheSpec | None = None
    layout: BatchLayout | None = None
    target: str = "cpu"
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def placeholders(self, role: Role | None = None) -> Iterator[fx.Node]:
        for node in self.graph.nodes:
            if node.op == "placeholder" and role in (None, self.inputs[node.name].role):
                yield node

    def calls(self, *targets: Any) -> list[fx.Node]:
        """The call nodes of any of `targets` (all calls when none is given), in graph order."""
        return [
            node
            for node in self.graph.nodes
            if node.op == "call_function" and (not targets or node.target in targets)
        ]

    def notes(self, name: str) -> list[dict[str, Any]]:
        """What the pass `name` noted; empty where it did not run."""
        return next((r.get("notes", []) for r in self.records if r["name"] == name), [])

    def input(self, name: str) -> fx.Node:
        """The placeholder of the token, batch or cache input `name`."""
        for node in self.placeholders():
            if self.inputs[node.name].name == name:
                return node
        raise KeyError(name)

    def weight_name(self, node: Any) -> str | None:
        """The planned name of a weight placeholder, None for any other value."""
        if isinstance(node, fx.Node) and node.op == "placeholder":
            entry = self.inputs[node.name]
            return entry.name if entry.role is Role.WEIGHT else None
        return None

    def weight(self, name: str) -> fx.Node:
        """The placeholder of planned weight `name`, made when the graph does not read it yet."""
        for node in self.placeholders(Role.WEIGHT):
            if self.inputs[node.name].name == name:
                return node
        spec = self.weights.specs[name]
        with self.fake_mode:
            value = torch.empty(spec.shape, dtype=spec.dtype, device="cpu")
        return self._placeholder(name, Role.WEIGHT, value)

    def add_input(self, name: str, role: Role, value: torch.Tensor) -> fx.Node:
        """A new token, batch or cache input with fake `value`."""
        return self._placeholder(name, role, value)

    def dynamic_input(
        self, hint: tuple[int, ...], dtype: torch.dtype, dynamic: tuple[int, ...], name: str
    ) -> torch.Tensor:
        """A fake value for `add_input`: sizes as in `hint`, symbolic in `dynamic` dimensions."""
        kinds = [
            DimDynamic.DYNAMIC if i in dynamic else DimDynamic.STATIC for i in range(len(hint))
        ]
        value: torch.Tensor = self.fake_mode.from_tensor(
            torch.empty(hint, dtype=dtype),
            source=ConstantSource(name),
            symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds),
        )
        return value

    def revalue(self, node: fx.Node) -> None:
        """Recompute a call's fake value after its inputs changed."""
        node.meta["val"] = self._value(node.target, node.args, node.kwargs)  # type: ignore[arg-type]

    def _placeholder(self, name: str, role: Role, value: torch.Tensor) -> fx.Node:
        last = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(name.replace(".", "_").replace("@", "_v"))
        node.target = node.name  # the argument's name in the code: unique and an identifier
        node.meta["val"] = value
        self.inputs[node.name] = Input(role, name)
        return node

    def point_weight(self, node: fx.Node, name: str) -> None:
        """Let weight placeholder `node` take its value from planned `name` of the same shape."""
        spec = self.weights.specs[name]
        value = node.meta["val"]
        if tuple(value.shape) != spec.shape or value.dtype != spec.dtype:
            raise ValueError(
                f"{node.name} is {tuple(value.shape)} {value.dtype}, "
                f"{name} is planned as {spec.shape} {spec.dtype}"
            )
        self.inputs[node.name] = Input(Role.WEIGHT, name)

    @property
    def fake_mode(self) -> Any:
        for node in self.placeholders():
            mode = detect_fake_mode(node.meta["val"])
            if mode is not None:
                return mode
        raise RuntimeError("the program has no fake values")

    def call(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        like: fx.Node,
        kwargs: dict[str, Any] | None = None,
    ) -> fx.Node:
        """A call at the graph's insertion point; value and module path are filled in.

        like: the node whose place in the model this one takes over.
        """
        node = self.graph.call_function(target, args, kwargs or {})
        node.meta["val"] = self._value(target, args, kwargs or {})
        for key in ("nn_module_stack", "stack_trace", "from_node"):
            if key in like.meta:
                node.meta[key] = like.meta[key]
        return node

    def _value(self, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        args, kwargs = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.fake_mode, torch.no_grad():
            return target(*args, **kwargs)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let every user of `old` read `new`; `old` goes with the next `clean`."""
        old.replace_all_uses_with(new)

    def clean(self) -> None:
        """Drop dead calls and inputs nothing reads, check the graph, regenerate its code."""
        self.graph.eliminate_dead_code(_is_impure)
        for node in list(self.placeholders()):
            if not node.users and self.inputs[node.name].role is Role.WEIGHT:
                del self.inputs[node.name]
                self.graph.erase_node(node)
        self.graph.lint()
        self.module.recompile()

    def used_weights(self) -> list[str]:
        """Planned names the graph reads, in graph order."""
        return [self.inputs[node.name].name for node in self.placeholders(Role.WEIGHT)]

    def run(self, values: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> Any:
        """Evaluate eagerly. values: by input name; weights: by planned name."""
        args = []
        for node in self.placeholders():
            entry = self.inputs[node.name]
            args.append(weights[entry.name] if entry.role is Role.WEIGHT else values[entry.name])
        with torch.no_grad():
            return self.module(*args)


def _is_impure(node: fx.Node) -> bool:
    if node.op in ("placeholder", "output"):
        return True
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def module_path(node: fx.Node) -> str:
    """Where in the model a node comes from: "model.layers.0.mlp.gate_proj", or "" at the top."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return path.split(".", 1)[1] if "." in path else ""


def module_type(node: fx.Node) -> str:
    """Class name of the innermost module a node comes from."""
    stack = node.meta.get("nn_module_stack") or {}
    kind = next(reversed(stack.values()))[1] if stack else ""
    return (kind if isinstance(kind, str) else kind.__name__).rsplit(".", 1)[-1]

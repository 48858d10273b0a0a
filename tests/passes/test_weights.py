"""The weight plan: it computes what its steps say, forgets what nobody reads, and is plain data."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.passes.weights import OPERATIONS, PlanError, Step, WeightPlan, operation


@dataclass
class Source:
    """A checkpoint that makes its tensors when asked and counts how many still live."""

    tensors: dict[str, torch.Tensor]
    asked: list[str] = field(default_factory=list)
    given: list[weakref.ref[torch.Tensor]] = field(default_factory=list)

    def tensor(self, name: str) -> torch.Tensor:
        self.asked.append(name)
        value = self.tensors[name].clone()
        self.given.append(weakref.ref(value))
        return value

    def alive(self) -> int:
        return sum(ref() is not None for ref in self.given)


def square(seed: int) -> torch.Tensor:
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))


# Per operation that keeps [4, 4]: (number of inputs, arguments, the same in torch).
MAPS: dict[str, tuple[int, dict[str, object], Callable[..., torch.Tensor]]] = {
    "transpose": (1, {"dim0": 0, "dim1": 1}, lambda x: x.T),
    "cast": (1, {"dtype": "float32"}, lambda x: x),
    "multiply_columns": (2, {}, lambda w, f: w * f[0]),
    "divide_rows": (2, {}, lambda x, f: x / f[0][:, None]),
}


@st.composite
def recipes(draw: st.DrawFn) -> list[tuple[str, tuple[int, ...]]]:
    """Operations over earlier values by number; values 0 to 2 are loaded."""
    steps: list[tuple[str, tuple[int, ...]]] = []
    for i in range(draw(st.integers(0, 8))):
        name = draw(st.sampled_from(sorted(MAPS)))
        count = MAPS[name][0]
        steps.append((name, tuple(draw(st.integers(0, 2 + i)) for _ in range(count))))
    return steps


def build(recipe: list[tuple[str, tuple[int, ...]]]) -> tuple[WeightPlan, list[str], Source]:
    plan = WeightPlan()
    source = Source({f"t{i}": square(i) for i in range(3)})
    names = [plan.load(f"w{i}", f"t{i}", (4, 4), torch.float32) for i in range(3)]
    for operator, inputs in recipe:
        reads = [names[i] for i in inputs]
        if len(reads) == 2:
            (reads[1],) = plan.add("rows", ["row"], [reads[1]], start=0, stop=1)
            (flat,) = plan.add("flat", ["flat"], [reads[1]])
            reads[1] = flat
        names += plan.add(operator, ["x"], reads, **MAPS[operator][1])
    return plan, names, source


@operation("flat")
def _flat(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (x.flatten(),)


@given(recipes(), st.data())
@settings(max_examples=60, deadline=None)
def test_materialize_equals_direct_evaluation(
    recipe: list[tuple[str, tuple[int, ...]]], data: st.DataObject
) -> None:
    plan, names, source = build(recipe)
    direct = [square(i) for i in range(3)]
    for operator, inputs in recipe:
        count, _, function = MAPS[operator]
        args = [direct[i] for i in inputs[:count]]
        if count == 2:
            args[1] = args[1][:1]
        direct.append(function(*args))
    numbers = data.draw(st.lists(st.integers(0, len(names) - 1), min_size=1, unique=True))
    made = dict(plan.materialize([names[i] for i in numbers], source))
    assert set(made) == {names[i] for i in numbers}
    for i in numbers:
        torch.testing.assert_close(made[names[i]], direct[i], equal_nan=True)
    assert len(set(source.asked)) == len(source.asked), "a tensor was read twice"


@given(recipes())
@settings(max_examples=20, deadline=None)
def test_a_plan_survives_json(recipe: list[tuple[str, tuple[int, ...]]]) -> None:
    plan, names, source = build(recipe)
    steps = [
        Step(s["op"], tuple(s["outputs"]), tuple(s["inputs"]), s["args"])
        for s in json.loads(json.dumps(plan.to_json()))
    ]
    again = WeightPlan(steps, plan.specs, plan.computed)
    assert again.digest() == plan.digest()
    first, second = dict(plan.materialize(names, source)), dict(again.materialize(names, source))
    for name in names:
        torch.testing.assert_close(first[name], second[name], equal_nan=True, rtol=0, atol=0)


def layers(count: int) -> tuple[WeightPlan, list[str], Source]:
    """`count` layers of two tensors joined, as fusing q and k makes them."""
    plan = WeightPlan()
    source = Source({f"{i}.{x}": square(i) for i in range(count) for x in "qk"})
    wanted = []
    for i in range(count):
        parts = [plan.load(f"{i}.{x}", f"{i}.{x}", (4, 4), torch.float32) for x in "qk"]
        wanted += plan.add("cat", [f"{i}.qk"], parts, dim=0)
    return plan, wanted, source


def test_streaming_keeps_one_layer_at_a_time() -> None:
    plan, wanted, source = layers(8)
    most = 0
    for _name, _value in plan.materialize(wanted, source):
        most = max(most, source.alive())
    assert len(source.given) == 16
    assert most <= 2, "tensors of earlier layers are kept"


def test_loads_come_just_before_their_reader() -> None:
    plan, wanted, source = layers(4)
    stream = plan.materialize(wanted, source)
    next(stream)
    assert source.asked == ["0.q", "0.k"]


def test_only_what_is_wanted_is_read() -> None:
    plan, wanted, source = layers(4)
    assert [name for name, _ in plan.materialize([wanted[2]], source)] == ["2.qk"]
    assert source.asked == ["2.q", "2.k"]


def test_a_wanted_name_that_others_read_is_given_too() -> None:
    plan, wanted, source = layers(1)
    made = dict(plan.materialize(["0.q", wanted[0]], source))
    torch.testing.assert_close(made[wanted[0]][:4], made["0.q"])


def test_steps_of_every_operation() -> None:
    x, row = square(1), square(2)[0]
    expected = {
        "cast": ({"dtype": "float16"}, (x,), (x.half(),)),
        "cat": ({"dim": 1}, (x, x), (torch.cat((x, x), 1),)),
        "stack": ({"dim": 0}, (x, x), (torch.stack((x, x)),)),
        "transpose": ({"dim0": 0, "dim1": 1}, (x,), (x.T,)),
        "rows": ({"start": 1, "stop": 3}, (x,), (x[1:3],)),
        "chunk": ({"parts": 2, "dim": 0}, (x,), (x[:2], x[2:])),
        "multiply_columns": ({}, (x, row), (x * row,)),
        "divide_rows": ({}, (x, row), (x / row[:, None],)),
        "divide_offset": ({"offset": 1.0}, (row, row), ((row + 1) / row - 1,)),
    }
    for name, (args, inputs, outputs) in expected.items():
        found = OPERATIONS[name](*inputs, **args)
        for one, other in zip(found, outputs, strict=True):
            torch.testing.assert_close(one, other)
            assert one.is_contiguous()


def test_a_taken_name_is_numbered() -> None:
    plan = WeightPlan()
    plan.load("w", "w", (4, 4), torch.float32)
    first = plan.add("transpose", ["w"], ["w"], dim0=0, dim1=1)
    second = plan.add("transpose", ["w"], [first[0]], dim0=0, dim1=1)
    third = plan.add("transpose", [second[0]], [second[0]], dim0=0, dim1=1)
    assert (first, second, third) == (("w@1",), ("w@2",), ("w@3",))
    values = dict(plan.materialize(["w", "w@1", "w@2"], Source({"w": square(0)})))
    assert torch.equal(values["w@1"], values["w"].T) and torch.equal(values["w@2"], values["w"])


def test_errors_name_what_is_wrong() -> None:
    plan = WeightPlan()
    plan.load("w", "w", (4, 4), torch.float32)
    with pytest.raises(PlanError, match="unknown operation 'melt'"):
        plan.add("melt", ["x"], ["w"])
    with pytest.raises(PlanError, match="cat reads 'v', which no step writes"):
        plan.add("cat", ["x"], ["w", "v"], dim=0)
    with pytest.raises(PlanError, match="chunk writes 2 tensors, 1 named"):
        plan.add("chunk", ["x"], ["w"], parts=2, dim=0)
    with pytest.raises(PlanError, match="'w' is written twice"):
        plan.load("w", "other", (4, 4), torch.float32)
    with pytest.raises(PlanError, match="nothing writes 'v'"):
        plan.needed(name for name in ["v"])
    with pytest.raises(ValueError, match="'cat' is registered twice"):
        operation("cat")(lambda x: (x,))


@pytest.mark.parametrize("value", [torch.zeros(4, 3), torch.zeros(4, 4, dtype=torch.float16)])
def test_a_tensor_that_is_not_as_planned_is_refused(value: torch.Tensor) -> None:
    plan = WeightPlan()
    plan.load("w", "w", (4, 4), torch.float32)
    with pytest.raises(PlanError, match=r"weight w: planned \(4, 4\) torch.float32, got"):
        dict(plan.materialize(["w"], Source({"w": value})))


def test_the_digest_sees_every_change() -> None:
    def plan(dim: int = 0, source: str = "a", value: float = 1.0, name: str = "s") -> str:
        made = WeightPlan()
        made.load("w", source, (4, 4), torch.float32)
        made.put(name, torch.full((3,), value))
        made.add("cat", ["x"], ["w", "w"], dim=dim)
        return made.digest()

    assert plan() == plan()
    changed = [plan(dim=1), plan(source="b"), plan(value=2.0), plan(name="t")]
    assert len({plan(), *changed}) == 5


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(8.0),
        torch.tensor([True, False]),
        torch.zeros(0, 3),
        torch.randn(3, 5).T,
        torch.randn(3, dtype=torch.bfloat16),
    ],
    ids=["scalar", "bool", "empty", "turned", "bfloat16"],
)
def test_any_computed_tensor_has_a_digest(value: torch.Tensor) -> None:
    plan = WeightPlan()
    name = plan.put("c", value)
    assert len(plan.digest()) == 64
    assert torch.equal(dict(plan.materialize([name], Source({})))[name], value)

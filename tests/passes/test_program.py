"""Program: its inputs, weights and calls, and what `clean` takes away."""

from __future__ import annotations

import pytest
import torch
from helpers.check_pass import logits_of
from helpers.tiny import Subject, Toy, clone_program, program_of
from torch import nn

from smelt.passes.program import Input, Role, module_path, module_type
from smelt.passes.rewrite import graph_text

aten = torch.ops.aten


class Model(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(16, 16), nn.Tanh())

    def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.block(x)


@pytest.fixture
def subject() -> Subject:
    return program_of(Model())


def test_inputs_have_roles_and_planned_names(subject: Subject) -> None:
    program = subject.program
    names = [program.inputs[n.name].name for n in program.placeholders(Role.TOKEN)]
    assert names == ["input_ids", "position_ids"]
    assert set(program.used_weights()) == {
        "embed.weight",
        "head.weight",
        "block.0.weight",
        "block.0.bias",
    }
    assert list(program.placeholders(Role.CACHE)) == []
    with pytest.raises(KeyError):
        program.input("kv_cache_0")


def test_a_weight_is_found_again_and_made_once(subject: Subject) -> None:
    program = subject.program
    node = program.weight("block.0.weight")
    assert program.weight_name(node) == "block.0.weight"
    program.weights.add("transpose", ["t"], ["block.0.weight"], dim0=0, dim1=1)
    made = program.weight("t")
    assert program.weight("t") is made
    assert tuple(made.meta["val"].shape) == (16, 16)
    assert program.weight_name(program.input("input_ids")) is None
    assert program.weight_name(3) is None


def test_names_that_read_alike_become_two_inputs(subject: Subject) -> None:
    """ "a.b" and "a_b" are one identifier; a name may hold what no identifier can."""
    program = subject.program
    (linear, _) = program.calls(aten.linear.default)
    x = linear.args[0]
    for name in ("a.b", "a_b", "a-b", "1"):
        program.weights.put(name, torch.zeros(16))
        with program.graph.inserting_after(linear):
            new = program.call(aten.add.Tensor, (x, program.weight(name)), like=linear)
        linear.replace_input_with(x, new)
        with program.graph.inserting_before(linear):
            moved = program.call(aten.add.Tensor, new.args, like=linear)
        linear.replace_input_with(new, moved)
        x = moved
    before = logits_of(program_of(Model()).program, subject.source, subject.ids)
    program.clean()
    assert torch.equal(logits_of(program, subject.source, subject.ids), before)


def test_pointing_a_weight_elsewhere_checks_its_shape(subject: Subject) -> None:
    program = subject.program
    node = program.weight("block.0.weight")
    program.weights.add("transpose", ["t"], ["block.0.weight"], dim0=0, dim1=1)
    program.point_weight(node, "t")
    assert "t" in program.used_weights()
    program.weights.put("small", torch.zeros(3))
    with pytest.raises(ValueError, match=r"is \(16, 16\) .*small is planned as \(3,\)"):
        program.point_weight(node, "small")


def test_clean_drops_dead_calls_and_unread_weights_and_keeps_inputs(subject: Subject) -> None:
    program = subject.program
    block = program.calls(aten.linear.default)[0]
    (tanh,) = program.calls(aten.tanh.default)
    program.replace(tanh, block.args[0])
    program.clean()
    assert program.calls(aten.tanh.default) == []
    assert set(program.used_weights()) == {"embed.weight", "head.weight"}
    assert set(program.inputs) == {node.name for node in program.placeholders()}
    program.input("position_ids")


def test_clean_keeps_calls_that_write(subject: Subject) -> None:
    program = subject.program
    block = program.calls(aten.linear.default)[0]
    with program.graph.inserting_after(block):
        program.call(aten.add_.Tensor, (block, 1.0), like=block)
    program.clean()
    assert len(program.calls(aten.add_.Tensor)) == 1


def test_a_call_takes_value_and_place_from_what_it_replaces(subject: Subject) -> None:
    program = subject.program
    block = program.calls(aten.linear.default)[0]
    with program.graph.inserting_after(block):
        node = program.call(aten.transpose.int, (block, 1, 2), like=block)
    assert [str(s) for s in node.meta["val"].shape] == ["1", "16", str(block.meta["val"].shape[1])]
    assert module_path(node) == "block.0"
    assert module_type(node) == "Linear"


def test_a_value_is_recomputed_when_its_input_changes(subject: Subject) -> None:
    program = subject.program
    (tanh,) = program.calls(aten.tanh.default)
    with program.graph.inserting_before(tanh):
        wide = program.call(aten.to.dtype, (tanh.args[0], torch.float64), like=tanh)
    tanh.replace_input_with(tanh.args[0], wide)
    program.revalue(tanh)
    assert tanh.meta["val"].dtype == torch.float64


def test_a_new_input_has_the_symbols_it_was_asked_for(subject: Subject) -> None:
    program = subject.program
    value = program.dynamic_input((3, 5), torch.int32, (0,), "table")
    node = program.add_input("table", Role.BATCH, value)
    assert program.inputs[node.name] == Input(Role.BATCH, "table")
    rows, columns = node.meta["val"].shape
    assert isinstance(rows, torch.SymInt) and columns == 5
    assert program.input("table") is node
    program.clean()
    assert program.input("table") is node, "a batch input stays even when nothing reads it"


def test_a_copy_changes_by_itself(subject: Subject) -> None:
    text = graph_text(subject.program.graph)
    copy = clone_program(subject.program)
    assert graph_text(copy.graph) == text
    (tanh,) = copy.calls(aten.tanh.default)
    copy.replace(tanh, tanh.args[0])
    copy.weights.put("new", torch.zeros(1))
    copy.clean()
    assert graph_text(subject.program.graph) == text
    assert "new" not in subject.program.weights.specs


def test_the_text_of_a_graph_names_symbols_by_appearance(subject: Subject) -> None:
    text = graph_text(subject.program.graph)
    assert "int64[s0] = input input_ids" in text
    assert "float32[1, s0, 37] = aten.linear.default" in text
    assert text == graph_text(program_of(Model()).program.graph)

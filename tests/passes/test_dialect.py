"""The verifiers: each thing a dialect forbids, named with its node and module path."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.tiny import Toy, program_of, tiny_lowered
from torch import fx, nn

from smelt.passes.attention.kv_cache import InsertKvCache
from smelt.passes.dialect import DialectError, smelt_name, verify
from smelt.passes.program import Dialect, Input, Program, Role

aten, smelt = torch.ops.aten, torch.ops.smelt


class Layered(Toy):
    def __init__(self) -> None:
        super().__init__(layers=1)
        self.inner = nn.Linear(16, 16, bias=False)

    def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        q = self.inner(x)[0].view(-1, 4, 4)
        return x + smelt.attention(q, q, q, 0.5, 0, 0.0, None).reshape(1, -1, 16)


@pytest.fixture
def program() -> Program:
    return program_of(Layered()).program


def first_linear(program: Program) -> fx.Node:
    return program.calls(aten.linear.default)[0]


def insert(program: Program, target: Callable[..., object], *args: object) -> fx.Node:
    """A call behind the first linear, which it also takes its place in the model from."""
    with program.graph.inserting_after(first_linear(program)):
        return program.call(target, args, like=first_linear(program))


def refused(program: Program, text: str) -> None:
    with pytest.raises(DialectError, match=text):
        verify(program)


def test_a_traced_program_is_in_the_aten_dialect(program: Program) -> None:
    verify(program)
    assert program.dialect is Dialect.ATEN


def test_an_operator_of_a_later_dialect_names_itself_node_and_module(program: Program) -> None:
    x = first_linear(program)
    node = insert(program, smelt.rms_norm.default, x, None, 1e-6, 0.0)
    refused(program, f"ATEN program: {node.name} in inner: smelt::rms_norm is not part of ATEN")
    program.dialect = Dialect.SEMANTIC
    verify(program)


def test_attention_without_a_cache_may_not_be_left_in_a_cached_program(program: Program) -> None:
    program.dialect = Dialect.CACHED
    refused(program, "smelt::attention is not part of CACHED")


def test_a_function_that_is_no_operator(program: Program) -> None:
    def own(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    insert(program, own, first_linear(program))
    refused(program, "own.* is neither an ATen nor a smelt operator")


def test_an_operator_of_another_library(program: Program) -> None:
    library = torch.library.Library("elsewhere", "DEF")
    try:
        library.define("same(Tensor x) -> Tensor")
        library.impl("same", lambda x: x.clone(), "CompositeExplicitAutograd")
        torch.library.register_fake("elsewhere::same", torch.empty_like, lib=library)
        insert(program, torch.ops.elsewhere.same.default, first_linear(program))
        refused(program, "elsewhere.same.default is neither an ATen nor a smelt operator")
    finally:
        library._destroy()


def test_a_node_that_is_neither_input_nor_call(program: Program) -> None:
    program.module.register_buffer("table", torch.zeros(3))
    with program.graph.inserting_before(first_linear(program)):
        program.graph.get_attr("table")
    refused(program, "a get_attr node; everything is an input or a call")


def test_a_node_without_a_value(program: Program) -> None:
    del first_linear(program).meta["val"]
    refused(program, r"in inner: no meta\['val'\]")


def test_an_input_without_a_role(program: Program) -> None:
    del program.inputs["input_ids"]
    refused(program, "input_ids: an input without a role")


def test_a_weight_nothing_makes(program: Program) -> None:
    node = next(iter(program.placeholders(Role.WEIGHT)))
    program.inputs[node.name] = Input(Role.WEIGHT, "nowhere")
    refused(program, "weight 'nowhere', which no step of the plan writes")


def test_a_weight_of_another_shape_than_planned(program: Program) -> None:
    node = first_linear(program).args[1]
    assert isinstance(node, fx.Node)
    with program.fake_mode:
        node.meta["val"] = torch.empty(16, 8)
    refused(program, r"weight 'inner.weight' as \(16, 8\) .*, planned as \(16, 16\)")


def test_a_cache_read_by_another_operator(program: Program) -> None:
    InsertKvCache().run(program, InsertKvCache.options({}))
    program.dialect = Dialect.CACHED
    program.clean()
    verify(program)
    cache = program.input("kv_cache_0")
    with program.graph.inserting_after(cache):
        program.call(aten.select.int, (cache, 1, 0), like=first_linear(program))
    refused(program, "a cache read by something other than a cache operator")


@pytest.mark.parametrize("operator", ["rms_norm", "cached_attention"])
def test_in_a_lowered_program_every_semantic_operator_has_a_provider(operator: str) -> None:
    program = program_of(Layered()).program
    InsertKvCache().run(program, InsertKvCache.options({}))
    program.clean()
    if operator == "rms_norm":
        (attention,) = program.calls(smelt.cached_attention.default)
        attention.meta["provider"] = "cpu"
        insert(program, smelt.rms_norm.default, first_linear(program), None, 1e-6, 0.0)
    program.dialect = Dialect.LOWERED
    refused(program, f"smelt::{operator} has no provider")


def test_the_default_pipeline_ends_in_a_valid_lowered_program() -> None:
    program = tiny_lowered("llama").program
    assert program.dialect is Dialect.LOWERED
    verify(program)


def test_the_name_of_a_smelt_operator(program: Program) -> None:
    (attention,) = program.calls(smelt.attention.default)
    assert smelt_name(attention) == "attention"
    assert smelt_name(first_linear(program)) is None

"""Groups are found by following channels through the graph, on real architectures and by hand."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from helpers.quantized import traced
from torch import fx
from torch._subclasses import FakeTensorMode

import smelt.runtime.ops
from smelt.passes.program import Dialect, Facts, Input, Program, Role
from smelt.passes.quantize.channels import follow
from smelt.passes.quantize.groups import Group, find_groups
from smelt.passes.quantize.linears import find_linears
from smelt.passes.quantize.spec import QuantSpec
from smelt.passes.weights import WeightPlan

SPEC = QuantSpec("rtn", "int4", 32)
aten = torch.ops.aten
smelt = torch.ops.smelt


def groups_of(program: Program) -> dict[str, Group]:
    """By the leaf names of the group's linears, first layer only."""
    found = {}
    for group in find_groups(program, find_linears(program, SPEC)):
        if re.search(r"\.0\.", group.name):
            found[" ".join(linear.layer.rsplit(".", 1)[-1] for linear in group.linears)] = group
    return found


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Qwen2", "Stablelm"])
def test_gated_decoders_fold_everywhere(name: str) -> None:
    program, _ = traced("StableLm" if name == "Stablelm" else name, num_hidden_layers=1)
    found = groups_of(program)
    assert set(found) == {"q_proj+k_proj+v_proj", "o_proj", "gate_proj+up_proj", "down_proj"}
    assert all(group.reason is None for group in found.values())
    norm = found["q_proj+k_proj+v_proj"].producer
    assert norm is not None and norm.offset == (1.0 if name == "Gemma2" else 0.0)
    assert (norm.bias is not None) == (name == "Stablelm")
    # o_proj reads the v rows of the fused weight: 64 of q, 32 of k, then 2 kv heads of 16, each
    # shared by two query heads.
    columns = found["o_proj"].columns
    kv = torch.arange(96, 128).unflatten(0, (2, 16))
    assert columns is not None and torch.equal(columns, kv.repeat_interleave(2, 0).flatten())
    up = found["down_proj"].columns
    assert up is not None and torch.equal(up, torch.arange(96, 192))


def test_unfused_linears_share_their_norm() -> None:
    from helpers.quantized import module, program_of

    found = groups_of(program_of(module("Llama", num_hidden_layers=1), opt="O1"))
    assert set(found) == {"q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"}
    down = found["down_proj"].producer
    assert down is not None and down.where.endswith("up_proj")


def test_fused_checkpoint_weights_of_phi3() -> None:
    found = groups_of(traced("Phi3", num_hidden_layers=1)[0])
    assert set(found) == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert all(group.reason is None for group in found.values())


def test_gpt2_declines_what_lies_behind_gelu() -> None:
    program, _ = traced("GPT2", n_layer=1)
    reasons = {g.name: g.reason for g in find_groups(program, find_linears(program, SPEC))}
    assert reasons["transformer.h.0.attn.c_proj"] is None
    assert reasons["transformer.h.0.attn.c_attn"] is None
    assert reasons["transformer.h.0.mlp.c_proj"] is not None


def test_gpt_neox_interleaves_q_k_and_v() -> None:
    found = groups_of(traced("GPTNeoX", num_hidden_layers=1)[0])
    columns = found["dense"].columns
    heads = torch.arange(192).unflatten(0, (4, 3, 16))
    assert columns is not None and torch.equal(columns, heads[:, 2].flatten())
    assert found["dense_4h_to_h"].producer is None


def test_parallel_residual_is_one_group() -> None:
    found = groups_of(traced("Cohere2", num_hidden_layers=1)[0])
    group = found["q_proj+k_proj+v_proj gate_proj+up_proj"]
    assert group.reason is None and len(group.linears) == 2


def test_relu_passes_a_positive_scale() -> None:
    program, _ = traced("OPT", num_hidden_layers=1)
    found = groups_of(program)
    assert found["fc2"].producer is not None and found["fc2"].producer.where.endswith("fc1")


def test_norm_after_the_layer_gives_no_producer() -> None:
    found = groups_of(traced("Olmo2", num_hidden_layers=1)[0])
    assert found["q_proj+k_proj+v_proj"].producer is None
    assert "aten::" in str(found["q_proj+k_proj+v_proj"].reason)
    assert found["o_proj"].producer is not None


def test_router_and_experts_are_left_alone() -> None:
    program, _ = traced("Mixtral", num_hidden_layers=1, num_local_experts=4)
    reasons = {linear.layer: linear.reason for linear in find_linears(program, SPEC)}
    assert reasons["model.layers.0.mlp.gate"] == "router"
    assert reasons["lm_head"] == "lm_head"


def test_tied_head_says_so() -> None:
    program, _ = traced("Llama", num_hidden_layers=1, tie_word_embeddings=True)
    (head,) = [item for item in find_linears(program, SPEC) if item.reason]
    assert head.reason == "lm_head (tied)"
    kept = QuantSpec("rtn", "int4", 32, keep=("router",))
    (head,) = [item for item in find_linears(program, kept) if item.reason]
    assert head.reason == "its weight is the embedding table"


# Hand-built graphs: a norm over [T, 32], then whatever `body` makes of it.

Body = Callable[["Builder", fx.Node], fx.Node]


class Builder:
    """A SEMANTIC program with symbolic T, built call by call."""

    def __init__(self) -> None:
        seed = fx.symbolic_trace(lambda input_ids: input_ids)
        exported = torch.export.export(
            seed,
            (torch.zeros(7, dtype=torch.int64),),
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        )
        module = fx.GraphModule(exported.graph_module, exported.graph)
        facts = Facts("Hand", "float32", 8, 64, 1, {})
        (ids,) = [n for n in module.graph.nodes if n.op == "placeholder"]
        self.program = Program(
            module,
            {ids.name: Input(Role.TOKEN, "input_ids")},
            WeightPlan(),
            facts,
            Dialect.SEMANTIC,
        )
        self.ids = ids
        self.output = next(n for n in module.graph.nodes if n.op == "output")

    def weight(self, name: str, *shape: int) -> fx.Node:
        self.program.weights.load(name, name, shape, torch.float32)
        return self.program.weight(name)

    def call(self, target: object, *args: object) -> fx.Node:
        with self.program.graph.inserting_before(self.output):
            return self.program.call(target, args, like=self.ids)  # type: ignore[arg-type]

    def linear(self, x: fx.Node, name: str, n: int, k: int) -> fx.Node:
        return self.call(aten.linear.default, x, self.weight(name, n, k), None)


def hand_built(body: Body) -> Program:
    b = Builder()
    x = b.call(aten.embedding.default, b.weight("embed", 8, 32), b.ids)
    n = b.call(smelt.rms_norm.default, x, b.weight("norm", 32), 1e-6, 0.0)
    y = body(b, n)
    head = b.linear(y, "head", 8, int(y.meta["val"].shape[-1]))
    b.output.args = ((head,),)
    b.program.clean()
    return b.program


def only_group(body: Body) -> Group:
    program = hand_built(body)
    groups = find_groups(program, find_linears(program, QuantSpec("rtn", "int4", 32)))
    return next(group for group in groups if group.linears[0].layer == "a")


def test_hand_built_norm_and_linear_fold() -> None:
    assert only_group(lambda b, n: b.linear(n, "a", 32, 32)).producer is not None


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda b, n: b.call(aten.add.Tensor, b.linear(n, "a", 32, 32), n), r"read by add"),
        (
            lambda b, n: b.call(
                aten.mul.Tensor, b.linear(n, "a", 32, 32), b.call(aten.sigmoid.default, n)
            ),
            r"read by sigmoid",
        ),
        (
            lambda b, n: b.linear(b.call(aten.mul.Tensor, n, n), "a", 32, 32),
            r"mul.* no scale passes|multiplies it with itself",
        ),
        (lambda b, n: b.linear(b.call(aten.softmax.int, n, -1), "a", 32, 32), r"softmax"),
        (
            lambda b, n: b.call(aten.cat.default, [b.linear(n, "a", 32, 32), n], -1),
            r"only some columns",
        ),
        (
            lambda b, n: b.call(
                aten.cat.default, [b.linear(n, "a", 32, 32), b.linear(n, "tiny", 8, 32)], -1
            ),
            r"stays at 16 bits",
        ),
    ],
)
def test_hand_built_near_misses_say_why(body: Body, reason: str) -> None:
    group = only_group(body)
    assert group.producer is None
    assert group.reason is not None and re.search(reason, group.reason)


def test_gate_blocks_and_up_passes() -> None:
    def body(b: Builder, n: fx.Node) -> fx.Node:
        both = b.linear(n, "gate_up", 64, 32)
        gate = b.call(aten.slice.Tensor, both, 1, 0, 32)
        up = b.call(aten.slice.Tensor, both, 1, 32, 64)
        return b.linear(b.call(smelt.gated_activation.default, gate, up, "silu"), "a", 32, 32)

    group = only_group(body)
    assert group.producer is not None and group.columns is not None
    assert group.columns.tolist() == list(range(32, 64))
    reach = follow(group.producer.node)
    assert set(reach.blocked) == set(range(32))

    def swapped(b: Builder, n: fx.Node) -> fx.Node:
        both = b.linear(n, "gate", 32, 32)
        return b.linear(b.call(smelt.gated_activation.default, both, both, "silu"), "a", 32, 32)

    assert only_group(swapped).producer is None


def test_weight_shared_with_another_reader_is_not_divided() -> None:
    def body(b: Builder, n: fx.Node) -> fx.Node:
        again = b.call(smelt.rms_norm.default, b.linear(n, "a", 32, 32), n.args[1], 1e-6, 0.0)
        return again

    group = only_group(body)
    assert group.producer is None and "other readers" in str(group.reason)


def test_following_keeps_to_concrete_sizes() -> None:
    """Channel numbers are pushed on plain tensors: no fake mode is entered or left behind."""
    program = hand_built(lambda b, n: b.linear(n, "a", 32, 32))
    (norm,) = program.calls(smelt.rms_norm.default)
    assert isinstance(program.fake_mode, FakeTensorMode)
    reach = follow(norm)
    assert all(type(columns) is torch.Tensor for columns in reach.columns.values())

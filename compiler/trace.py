"""Trace: an unmodified transformers module to a packed-token `Program`.

transformers lets a program register its own attention and expert functions. With ours,
`torch.export` of the module gives one smelt::attention node a layer and no mask arithmetic. What
does not go through these interfaces, or keeps state this graph has no place for, is refused by
name here and never compiled into something wrong: the trace ends by comparing the exported graph
with the module's own eager logits.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import smelt.runtime.ops  # noqa: F401 - registers the operators
from smelt.models.config import SHRUNK_LIMIT, max_positions, shrink
from smelt.models.skeleton import build, fake_parameters
from smelt.passes.program import Facts, Input, Program, Role
from smelt.passes.weights import WeightPlan
from smelt.runtime.errors import UserError

from .rotary import RotaryError, length_rotaries, rotation_by_token

ATTENTION = "smelt"
TRACE_TOKENS = 24


class TraceError(UserError):
    """The model cannot be traced into something correct; the text says why and where."""


class PackedForward(nn.Module):
    """The module as a function of packed tokens: input_ids, position_ids [T] -> logits [T, V]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        output = self.model(
            input_ids=input_ids[None], position_ids=position_ids[None], use_cache=False
        )
        logits: torch.Tensor = output.logits[0]
        return logits


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **unknown: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, H, T, D], key and value [1, G, T, D]."""
    name = type(module).__name__
    if attention_mask is not None:
        raise TraceError(f"{name} brings its own attention mask, which smelt does not support")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise TraceError(f"{name} is not causal; smelt compiles decoder-only models")
    if value.shape[-1] != query.shape[-1]:
        raise TraceError(
            f"{name} has values of size {value.shape[-1]} beside keys of size {query.shape[-1]} "
            "(latent attention); this is not supported yet"
        )
    for option in ("position_bias", "alibi", "indices"):
        if unknown.get(option) is not None:
            raise TraceError(f"{name} passes {option} to its attention; this is not supported yet")
    packed = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    out = torch.ops.smelt.attention(
        *packed, scale, int(sliding_window or 0), float(softcap or 0.0), s_aux
    )
    return out[None], None


# Found before the export starts: inside it, every value is fake and cannot be compared.
_EXPERT_ACTIVATIONS: dict[int, str | None] = {}


def _experts(
    self: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """transformers' experts interface: hidden [T, K], index and weight [T, top_k] -> [T, K]."""
    name = type(self).__name__
    kind = _EXPERT_ACTIVATIONS.get(id(self))
    plain = (
        getattr(self, "is_concatenated", True)
        and getattr(self, "has_gate", True)
        and not getattr(self, "is_transposed", False)
        and not getattr(self, "has_bias", False)
        and not getattr(self, "has_post_expert_norm", False)
        and type(self)._apply_gate.__name__ == "_default_apply_gate"  # type: ignore[attr-defined]
    )
    if kind is None or not plain:
        raise TraceError(f"{name} lays its experts out in a way that is not supported yet")
    out: torch.Tensor = torch.ops.smelt.experts(
        hidden, index, weight, self.gate_up_proj, self.down_proj, kind
    )
    return out


def activation_kind(module: Any) -> str | None:
    """smelt's name of an activation module, found by what it computes; None when unknown."""
    from smelt.runtime.ops.gated_activation import ACTIVATIONS, activate

    if not callable(module):
        return None
    x = torch.linspace(-4, 4, 33)
    try:
        y = module(x)
    except Exception:
        return None
    for kind in ACTIVATIONS:
        if torch.allclose(y, activate(x, kind), atol=1e-6):
            return kind
    return None


def _register() -> None:
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(ATTENTION, _attention)
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:
        return
    ALL_EXPERTS_FUNCTIONS.register(ATTENTION, _experts)


@contextlib.contextmanager
def _our_interfaces(model: Any) -> Iterator[None]:
    """The model's attention and experts go through our functions inside, and back afterwards."""
    _register()
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    saved = [
        (c, getattr(c, "_attn_implementation", None), getattr(c, "_experts_implementation", None))
        for c in configs
    ]
    for module in model.modules():
        if hasattr(module, "_apply_gate"):
            _EXPERT_ACTIVATIONS[id(module)] = activation_kind(getattr(module, "act_fn", None))
    for config in configs:
        config._attn_implementation = ATTENTION
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = ATTENTION
    try:
        yield
    finally:
        _EXPERT_ACTIVATIONS.clear()
        for config, attention, experts in saved:
            config._attn_implementation = attention
            if hasattr(config, "_experts_implementation"):
                config._experts_implementation = experts


def export(model: nn.Module) -> ExportedProgram:
    """`torch.export` of the module over packed tokens with a symbolic T.

    Raises TraceError with the source line that breaks it.
    """
    ids = torch.zeros(TRACE_TOKENS, dtype=torch.int64)
    dynamic = {0: Dim.DYNAMIC}
    try:
        with _our_interfaces(model), rotation_by_token(model), torch.no_grad():
            return torch.export.export(
                PackedForward(model),
                (ids, torch.arange(TRACE_TOKENS)),
                dynamic_shapes=(dynamic, dynamic),
                strict=False,
            )
    except (TraceError, RotaryError):
        raise
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} does not export: {_first_line(error)} ({_model_line(error)})"
        ) from error


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _model_line(error: BaseException) -> str:
    """file:line of the innermost frame inside modelling code."""
    found = "outside the modelling code"
    frame = error.__traceback__
    while frame is not None:
        file = frame.tb_frame.f_code.co_filename
        if "modeling_" in file or f"{os.sep}models{os.sep}" in file:
            found = f"{file}:{frame.tb_lineno}"
        frame = frame.tb_next
    return found


def program_from_export(exported: ExportedProgram, model: nn.Module, config: Any) -> Program:
    """Wrap an export as a Program: roles for inputs, a load step for each weight."""
    module = fx.GraphModule(exported.graph_module, exported.graph)
    plan = WeightPlan()
    inputs: dict[str, Input] = {}
    signature = exported.graph_signature
    weights = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = {**exported.constants, **dict(exported.named_buffers())}
    for node in module.graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in signature.inputs_to_parameters:
            name = weights[node.name].split(".", 1)[1]
            value = node.meta["val"]
            plan.load(name, name, value.shape, value.dtype)
            inputs[node.name] = Input(Role.WEIGHT, name)
        elif node.name in weights or node.name in signature.inputs_to_lifted_tensor_constants:
            key = weights.get(node.name) or signature.inputs_to_lifted_tensor_constants[node.name]
            value = constants[key]
            if isinstance(value, torch._subclasses.FakeTensor):
                raise TraceError(f"{type(model).__name__}: the value of buffer {key} is not known")
            name = plan.put(key.split(".", 1)[-1], value.clone())
            inputs[node.name] = Input(Role.WEIGHT, name)
        else:
            inputs[node.name] = Input(Role.TOKEN, node.name)
    for node in list(module.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            module.graph.erase_node(node)
    facts = Facts(
        model_class=type(model).__name__,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        vocab_size=int(config.vocab_size),
        max_position=max_positions(config),
        hidden_layers=int(config.num_hidden_layers),
        module_counts=count_modules(model),
    )
    program = Program(module, inputs, plan, facts)
    program.clean()
    return program


def count_modules(model: nn.Module) -> dict[str, int]:
    """How many modules of each kind the tree has, by the parameters and children they own."""
    counts: Counter[str] = Counter()
    for name, module in model.named_modules():
        kind = type(module).__name__
        children = {child for child, _ in module.named_children()}
        for siblings in ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}):
            if siblings <= children:
                counts["sibling_linears"] += 1
        if isinstance(module, nn.Linear) or kind == "Conv1D":
            counts["linear"] += 1
        elif isinstance(module, nn.LayerNorm):
            counts["layer_norm"] += 1
        elif kind.lower().endswith("rmsnorm"):
            counts["rms_norm"] += 1
        elif kind.lower().endswith("norm") and not children:
            counts["layer_norm"] += 1
        elif kind.endswith("Attention") and hasattr(module, "layer_idx"):
            counts["attention"] += 1
        elif {"gate_proj", "up_proj", "down_proj"} <= children or "gate_up_proj" in children:
            counts["gated_mlp"] += 1
        elif kind.endswith("Experts") and name:
            counts["experts"] += 1
    counts["rotary_by_length"] = len(length_rotaries(model))
    return {kind: count for kind, count in counts.items() if count}


def refuse_unsupported(program: Program, config: Any) -> None:
    """Raise TraceError, naming the class and the reason, for structures without support yet."""
    name = program.facts.model_class
    nodes = program.calls(torch.ops.smelt.attention.default)
    if not nodes:
        raise TraceError(
            f"{name}: no attention node found; its attention does not go through transformers' "
            "attention interface, and recurrent models are not supported yet"
        )
    if len(nodes) != program.facts.hidden_layers:
        raise TraceError(
            f"{name}: {program.facts.hidden_layers} layers but {len(nodes)} attention nodes; "
            "layers with recurrent or linear attention are not supported yet"
        )
    keys = Counter(_source(node.args[1]) for node in nodes)
    if max(keys.values()) > 1:
        raise TraceError(f"{name} shares keys between layers; this is not supported yet")


_VIEWS = {
    torch.ops.aten.transpose.int,
    torch.ops.aten.select.int,
    torch.ops.aten.view.default,
    torch.ops.aten.reshape.default,
}


def _source(node: Any) -> Any:
    while isinstance(node, fx.Node) and node.target in _VIEWS:
        node = node.args[0]
    return node


def trace_config(config: Any, dtype: torch.dtype, trust_remote_code: bool = False) -> Program:
    """Trace the causal LM of `config` in `dtype` with fake weights."""
    model = build(config, dtype, real=False, trust_remote_code=trust_remote_code)
    fake_parameters(model, FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True))
    program = program_from_export(export(model), model, config)
    refuse_unsupported(program, config)
    return program


def _small_model(
    config: Any, trust_remote_code: bool
) -> tuple[Any, nn.Module, torch.Tensor, torch.Tensor]:
    """(configuration, module, token ids [T], eager logits [T, V]) of a small random model.

    A class whose shrunk sizes do not fit together is tried with its own sizes and fewer layers.
    """
    failure: Exception | None = None
    for widths in (True, False):
        small = shrink(config, widths)
        for name in ("sliding_window", "attention_chunk_size"):
            if isinstance(getattr(small, name, None), int):
                setattr(small, name, 8)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                model = build(small, torch.float32, real=True, trust_remote_code=trust_remote_code)
                for parameter in model.parameters():
                    if parameter.dim() == 1:
                        parameter.data += 0.1 * torch.randn_like(parameter)
                ids = torch.randint(0, small.vocab_size, (TRACE_TOKENS + 5,))
                with torch.no_grad():
                    return small, model, ids, PackedForward(model)(ids, torch.arange(len(ids)))
            except (RuntimeError, ValueError, UserError) as error:
                failure = error
    raise TraceError(
        f"{type(config).__name__}: a small random model of this class does not run in eager "
        f"transformers: {_first_line(failure or Exception())}"
    ) from failure


_CHECKED: set[tuple[type, str]] = set()


def check_once(config: Any, trust_remote_code: bool = False) -> None:
    """`check_against_eager`, once a process for a configuration; code of a folder each time."""
    key = (type(config), str(config.to_json_string()))
    if trust_remote_code or key not in _CHECKED:
        check_against_eager(config, trust_remote_code)
        _CHECKED.add(key)


def check_against_eager(config: Any, trust_remote_code: bool = False) -> tuple[Program, float]:
    """Trace a small random model of the same class and compare its logits with eager's, in fp32.

    Returns the small program and the largest absolute difference. Raises TraceError beyond 1e-4:
    a graph that differs would be wrong on the real weights too. Sliding windows and attention
    chunks shrink below the number of tokens, so that a mask our attention does not reproduce shows.
    """
    small, model, ids, expected = _small_model(config, trust_remote_code)
    positions = torch.arange(ids.shape[0])
    exported = export(model)
    with torch.no_grad():
        difference = (exported.module()(ids, positions) - expected).abs().max().item()
        if length_rotaries(model):
            # The sequence above is longer than the limit of the small model, this one is not.
            few = slice(0, SHRUNK_LIMIT - 3)
            short = PackedForward(model)(ids[few], positions[few])
            again = exported.module()(ids[few], positions[few])
            difference = max(difference, (again - short).abs().max().item())
    if not difference <= 1e-4:
        raise TraceError(
            f"{type(model).__name__}: the traced graph's logits differ from eager's by "
            f"{difference:.2g}; smelt does not reproduce this model's attention"
        )
    program = program_from_export(exported, model, small)
    refuse_unsupported(program, small)
    return program, difference

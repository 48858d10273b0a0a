"""What a quantized checkpoint says about itself: its `quantization_config`, checked and as data.

Formats, as their projects publish them:

awq                 AutoAWQ, layout GEMM: 4 bits, a scale and a zero point a group of features.
gptq                AutoGPTQ and GPTQModel: 4 or 8 bits, `desc_act`, zero points stored minus one
                    (`checkpoint_format` gptq) or as they are (gptq_v2).
compressed-tensors  `config_groups` with targets: pack-quantized, int-quantized, float-quantized and
                    naive-quantized weights.
fp8                 DeepSeek and Qwen3-FP8: float8_e4m3fn with a scale a block of 128 x 128, or one
                    a tensor.

Nothing here reads a tensor; `models/stored.py` finds the tensors that a description announces.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from smelt.runtime.errors import UserError

READ = ("awq", "gptq", "compressed-tensors", "fp8")
_ADVICE = "name the original model, or a checkpoint in one of the formats of docs/checkpoints.md"


@dataclass(frozen=True)
class Inputs:
    """How a checkpoint rounds the input of a layer.

    kind: "int" or "float". dynamic: a scale as the values come, else one that the checkpoint holds.
    per: what a scale covers: "token", "tensor", or "group", the last with `group` features of a
    token. symmetric: no zero points.
    """

    kind: str
    bits: int
    dynamic: bool
    per: str
    group: int = 0
    symmetric: bool = True


@dataclass(frozen=True)
class WeightForm:
    """How a linear's weight is stored.

    layout: "awq", "gptq", "packed" (weight_packed), "plain" (an int8 or float8 tensor named weight)
    or "block" (float8 with weight_scale_inv). bits; kind: "int" or "float". group: features a scale
    covers, 0 for the whole row. rows: rows a scale covers, 0 for all of them. symmetric: no zero
    points. zero_offset: what the stored zero points lack. inputs: how the layer's input is rounded;
    None when it is left alone.
    """

    layout: str
    bits: int
    kind: str = "int"
    group: int = 0
    rows: int = 1
    symmetric: bool = False
    zero_offset: int = 0
    inputs: Inputs | None = None

    @property
    def name(self) -> str:
        """ "int4", "int8" or "fp8"."""
        return f"int{self.bits}" if self.kind == "int" else f"fp{self.bits}"


@dataclass(frozen=True)
class Rule:
    """A form and the modules that have it: names, "re:" patterns, or a class such as Linear."""

    targets: tuple[str, ...]
    form: WeightForm


@dataclass(frozen=True)
class Quantization:
    """A checkpoint's quantization: the method's name, its rules, and the modules left alone.

    varies: modules may differ from the rules (GPTQModel's `dynamic`); their tensors then decide.
    """

    method: str
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    varies: bool = False

    def form(self, module: str) -> WeightForm | None:
        """The form announced for the linear at `module`; None when it is left alone."""
        if any(_matches(module, target, part=True) for target in self.ignored):
            return None
        named = [r for r in self.rules if any(_matches(module, t) for t in r.targets)]
        general = [r for r in self.rules if any(_is_class(t) for t in r.targets)]
        return next((rule.form for rule in (*named, *general)), None)

    def is_what(self, method: str, format: str, group_size: int, activations: str) -> bool:
        """Whether `--quant method --format format` asks for what the checkpoint already is."""
        form = self.rules[0].form
        rounded = "none"
        if form.inputs is not None:
            rounded = "dynamic" if form.inputs.dynamic else "static"
        asked = (method, format, group_size, activations)
        return len(self.rules) == 1 and asked == (self.method, form.name, form.group, rounded)

    def label(self) -> str:
        """For reports: "gptq int4 g128", or "compressed-tensors float8"."""
        form = self.rules[0].form
        kind = f"float{form.bits}" if form.kind == "float" else f"int{form.bits}"
        group = f" g{form.group}" if form.group else ""
        return f"{self.method} {kind}{group}" if len(self.rules) == 1 else f"{self.method} mixed"

    def to_json(self) -> dict[str, Any]:
        """As the manifest's `quant` holds it."""
        form = self.rules[0].form
        return {
            "method": self.method,
            "format": form.name,
            "group_size": form.group,
            "from": "checkpoint",
            "mixed": len(self.rules) > 1 or self.varies,
        }


def _is_class(target: str) -> bool:
    return not target.startswith("re:") and "." not in target and target[:1].isupper()


def _matches(module: str, target: str, part: bool = False) -> bool:
    """Whether `target` names the module: in full, by its last words, or as a pattern.

    part: the target may also stand for everything below it ("lm_head", "model.layers.0").
    """
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    if module == target or module.endswith("." + target):
        return True
    return part and (module.startswith(target + ".") or f".{target}." in module)


def describe(raw: Mapping[str, Any], where: str) -> Quantization | None:
    """The quantization that a config.json announces, None for an ordinary checkpoint.

    Raises UserError for a method, layout or number that smelt does not read.
    """
    given = raw.get("quantization_config")
    if not given:
        return None
    if not isinstance(given, Mapping):
        raise UserError(f"{where}: quantization_config is no JSON object; {_ADVICE}")
    method = given.get("quant_method")
    parsers = {
        "awq": _awq,
        "gptq": _gptq,
        "compressed-tensors": _compressed_tensors,
        "fp8": _fp8,
    }
    if method not in parsers:
        raise UserError(
            f"{where}: the checkpoint is quantized with {method}; smelt reads {', '.join(READ)}; "
            "name the original model"
        )
    return parsers[str(method)](given, f"{where} (quantization_config)")


def _number(given: Mapping[str, Any], names: tuple[str, ...], where: str, default: Any) -> int:
    value = next((given[name] for name in names if given.get(name) is not None), default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{where}: {names[0]} is {value!r}, expected a whole number")
    return value


def _group(value: int, where: str) -> int:
    if value in (-1, 0):
        return 0
    if value < 1:
        raise UserError(f"{where}: group_size is {value}, expected -1 or a number of features")
    return value


def _bits(value: int, known: tuple[int, ...], where: str) -> int:
    if value not in known:
        names = " and ".join(map(str, known))
        raise UserError(f"{where}: {value} bits; smelt reads {names} bits here; {_ADVICE}")
    return value


def _names(value: Any, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise UserError(f"{where}: expected a list of module names, found {value!r}")
    for name in value:
        if name.startswith("re:"):
            try:
                re.compile(name[3:])
            except re.error as error:
                raise UserError(f"{where}: {name} is not a pattern: {error}") from error
    return tuple(value)


def _awq(given: Mapping[str, Any], where: str) -> Quantization:
    version = str(given.get("version") or given.get("format") or "gemm").lower()
    if version != "gemm":
        raise UserError(f"{where}: AWQ layout {version}; smelt reads gemm; {_ADVICE}")
    if given.get("zero_point") is False:
        raise UserError(f"{where}: AWQ without zero points has no published layout; {_ADVICE}")
    bits = _bits(_number(given, ("bits", "w_bit"), where, 4), (4,), where)
    group = _group(_number(given, ("group_size", "q_group_size"), where, 128), where)
    ignored = _names(given.get("modules_to_not_convert"), f"{where}: modules_to_not_convert")
    return Quantization("awq", (Rule(("Linear",), WeightForm("awq", bits, group=group)),), ignored)


def _gptq(given: Mapping[str, Any], where: str) -> Quantization:
    layout = str(given.get("checkpoint_format") or given.get("format") or "gptq").lower()
    if layout not in ("gptq", "gptq_v2"):
        raise UserError(f"{where}: GPTQ layout {layout}; smelt reads gptq and gptq_v2; {_ADVICE}")
    bits = _bits(_number(given, ("bits",), where, 4), (4, 8), where)
    group = _group(_number(given, ("group_size",), where, 128), where)
    symmetric = bool(given.get("sym", True))
    offset = 1 if layout == "gptq" else 0
    form = WeightForm("gptq", bits, group=group, symmetric=symmetric, zero_offset=offset)
    varies = bool(given.get("dynamic"))
    ignored = _names(given.get("modules_to_not_convert"), f"{where}: modules_to_not_convert")
    return Quantization("gptq", (Rule(("Linear",), form),), ignored, varies)


def _fp8(given: Mapping[str, Any], where: str) -> Quantization:
    kind = given.get("fmt", "e4m3")
    if kind != "e4m3":
        raise UserError(f"{where}: float8 {kind}; smelt reads e4m3; {_ADVICE}")
    block = given.get("weight_block_size")
    rows, group = (0, 0) if block is None else _block(block, where)
    dynamic = (given.get("activation_scheme") or "dynamic") == "dynamic"
    per = ("token" if block is None else "group") if dynamic else "tensor"
    inputs = Inputs("float", 8, dynamic, per, group if per == "group" else 0)
    form = WeightForm("block", 8, "float", group, rows, symmetric=True, inputs=inputs)
    ignored = _names(given.get("modules_to_not_convert"), f"{where}: modules_to_not_convert")
    return Quantization("fp8", (Rule(("Linear",), form),), ignored)


def _block(value: Any, where: str) -> tuple[int, int]:
    if (
        not isinstance(value, list | tuple)
        or len(value) != 2
        or not all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in value)
    ):
        raise UserError(f"{where}: weight block {value!r}, expected two sizes such as [128, 128]")
    return int(value[0]), int(value[1])


_CT_LAYOUTS = {
    "pack-quantized": "packed",
    "int-quantized": "plain",
    "float-quantized": "plain",
    "naive-quantized": "plain",
}


def _compressed_tensors(given: Mapping[str, Any], where: str) -> Quantization:
    if given.get("quantization_status", "compressed") != "compressed":
        raise UserError(
            f"{where}: quantization_status is {given['quantization_status']}, so the weights are "
            "not stored compressed; save the model compressed"
        )
    for name in ("transform_config", "sparsity_config"):
        extra = given.get(name)
        dense = isinstance(extra, Mapping) and extra.get("format") in (None, "dense")
        if extra and not (name == "sparsity_config" and dense):
            raise UserError(f"{where}: {name} is not supported yet; {_ADVICE}")
    groups = given.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise UserError(f"{where}: no config_groups, so no weight has a scheme")
    rules = []
    for name, group in groups.items():
        here = f"{where}: config_groups.{name}"
        if not isinstance(group, Mapping):
            raise UserError(f"{here} is no JSON object; {_ADVICE}")
        if group.get("weights") is None:
            continue
        targets = _names(group.get("targets"), f"{here}.targets")
        rules.append(Rule(targets, _scheme(group, str(given.get("format")), here)))
    if not rules:
        raise UserError(f"{where}: no config group quantizes weights; {_ADVICE}")
    ignored = _names(given.get("ignore"), f"{where}: ignore")
    return Quantization("compressed-tensors", tuple(rules), ignored)


def _scheme(group: Mapping[str, Any], format: str, where: str) -> WeightForm:
    weights = group["weights"]
    if not isinstance(weights, Mapping):
        raise UserError(f"{where}.weights is no JSON object; {_ADVICE}")
    format = str(group.get("format") or format)
    if format not in _CT_LAYOUTS:
        known = ", ".join(_CT_LAYOUTS)
        raise UserError(f"{where}: format {format}; smelt reads {known}; {_ADVICE}")
    layout = _CT_LAYOUTS[format]
    kind = str(weights.get("type", "int"))
    if kind not in ("int", "float"):
        raise UserError(f"{where}: weights of type {kind}; {_ADVICE}")
    known_bits = (4, 8) if layout == "packed" else (8,)
    bits = _bits(_number(weights, ("num_bits",), where, 8), known_bits, where)
    if layout == "packed" and kind == "float":
        raise UserError(f"{where}: packed float{bits} weights are not supported yet; {_ADVICE}")
    size, rows = _strategy(weights, where)
    return WeightForm(
        layout,
        bits,
        kind,
        size,
        rows,
        symmetric=bool(weights.get("symmetric", True)),
        inputs=_inputs(group.get("input_activations"), where),
    )


def _strategy(weights: Mapping[str, Any], where: str) -> tuple[int, int]:
    """(features, rows) a scale covers, 0 for all."""
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("group" if size and size > 0 else "tensor")
    if strategy == "group":
        return _group(_number(weights, ("group_size",), where, None), where), 1
    if strategy == "channel":
        return 0, 1
    if strategy == "tensor":
        return 0, 0
    if strategy == "block":
        rows, features = _block(weights.get("block_structure"), where)
        return features, rows
    raise UserError(f"{where}: strategy {strategy} is not supported yet; {_ADVICE}")


def _inputs(given: Any, where: str) -> Inputs | None:
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise UserError(f"{where}.input_activations is no JSON object; {_ADVICE}")
    dynamic = bool(given.get("dynamic"))
    return Inputs(
        str(given.get("type", "int")),
        _number(given, ("num_bits",), where, 8),
        dynamic,
        str(given.get("strategy") or "tensor"),
        _number(given, ("group_size",), where, 0),
        bool(given.get("symmetric", True)),
    )

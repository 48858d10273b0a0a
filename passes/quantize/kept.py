"""Which operator keeps the weights of a quantized checkpoint as they are, and what becomes of the
rounding of its inputs. Asked with a weight's description, so that planning needs no weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import gcd
from typing import Any

from smelt.runtime.ops.experts_quantized import BLOCK_ROWS
from smelt.runtime.ops.linear_w8a8 import MAX_K

from .spec import Scheme


def kept_scheme(
    form: Mapping[str, Any], *, zeros: bool = False, k: int = 0
) -> tuple[Scheme | None, str | None]:
    """(the scheme that keeps a stored weight, what it leaves out), or (None, why there is none).

    form: "kind" int or float; "bits"; "group" features and "rows" that a scale covers, 0 for all;
    "inputs", how the checkpoint rounds the layer's input: None, or "kind", "bits", "dynamic",
    "per" token, tensor or group, "group" features, "symmetric". zeros: whether 8-bit weights have
    zero points. k: the layer's features.
    """
    if form["kind"] == "float":
        return _float8(form)
    group, rows = form["group"], form["rows"]
    if rows > 1 or (rows == 0 and group):
        return None, "no operator yet for integers with scales that blocks of rows share"
    if form["bits"] == 4:
        if rows == 0:
            return None, "no operator yet for 4 bits with one scale a tensor"
        return Scheme("int4", group), _left(form)
    if zeros:
        return None, "no operator yet for 8 bits with zero points"
    mode = None if group or k > MAX_K else _mode(form, "int", per="token")
    if mode is None:
        return Scheme("int8", group), _left(form)
    return Scheme("int8", 0, mode), None


def kept_expert_scheme(
    form: Mapping[str, Any], *, zeros: bool = False
) -> tuple[Scheme | None, str | None]:
    """`kept_scheme` of an expert's linear. The operator of experts leaves inputs as they are."""
    scheme, reason = kept_scheme({**form, "inputs": None}, zeros=zeros)
    if scheme is None:
        return None, reason
    return scheme, _left(form, "the operator of experts rounds none")


NEXT_EXPERT = "a block of {} scales reaches into the next expert"


def expert_block(block: int, rows: Iterable[int]) -> int | None:
    """The largest square of weights, within `block`, whose float8 scales the operator of experts
    can hold: each linear's rows must end with one. 0 stays; None where it is too small."""
    for n in rows:
        block = gcd(block, n) if block else 0
    return block if block % BLOCK_ROWS == 0 else None


def unfit_groups(group: int, k: int) -> str | None:
    """Why the operator of experts cannot hold groups of integers, or None. group 0: whole rows."""
    if group and k % group:
        return "its groups have different sizes"
    if group % BLOCK_ROWS and group != k:
        return f"kernels read features {BLOCK_ROWS} at a time, and its groups have {group}"
    return None


def _float8(form: Mapping[str, Any]) -> tuple[Scheme | None, str | None]:
    group, rows = form["group"], form["rows"]
    if group and group != rows:
        return None, f"no operator yet for float8 with scales of {rows or 'all'} x {group} weights"
    if rows > 1 and not group:
        return None, f"no operator yet for float8 with scales of {rows} rows"
    per = "group" if group else "token"
    mode = _mode(form, "float", per)
    if mode == "dynamic" and form["inputs"]["group"] != group:
        mode = None
    if mode is None:
        return Scheme("fp8", group), _left(form)
    return Scheme("fp8", group, mode), None


def _mode(form: Mapping[str, Any], kind: str, per: str) -> str | None:
    """ "dynamic" or "static" where our operators round as the checkpoint asks, else None.

    per: what a dynamic scale covers in the operator.
    """
    inputs = form["inputs"]
    if inputs is None or inputs["kind"] != kind or inputs["bits"] != 8 or not inputs["symmetric"]:
        return None
    if inputs["dynamic"]:
        return "dynamic" if inputs["per"] == per else None
    return "static" if inputs["per"] == "tensor" else None


def _left(form: Mapping[str, Any], why: str = "no operator rounds them so") -> str | None:
    """The remark about inputs that a checkpoint rounds and the operator does not."""
    inputs = form["inputs"]
    if inputs is None:
        return None
    how = "dynamic" if inputs["dynamic"] else "static"
    size = f" of {inputs['group']}" if inputs["group"] else ""
    zeros = "" if inputs["symmetric"] else ", with zero points"
    words = f"{inputs['kind']}{inputs['bits']}, {how} per {inputs['per']}{size}{zeros}"
    return f"its activations ({words}) stay as they are: {why}"

"""A transformers module whose weights are fake: shapes and dtypes without storage.

Parameters are fake tensors, buffers that a constructor computes (rotary frequencies) are real, so
that the graph of a 70B model traces on a laptop.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from smelt.runtime.errors import UserError


@contextlib.contextmanager
def meta_parameters() -> Iterator[None]:
    """Every parameter registered inside becomes a meta tensor at once; buffers are left alone.

    An initialiser then runs on meta tensors and costs nothing, and the one real allocation alive at
    a time is untouched pages.
    """
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(self, name, param)
        if param is not None and param.device.type != "meta":
            self._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


_BUILD_ERRORS = (
    *(ValueError, KeyError, TypeError, RuntimeError),
    *(AttributeError, ImportError, ArithmeticError, AssertionError),
)


def build(
    config: Any, dtype: torch.dtype, real: bool, trust_remote_code: bool = False
) -> nn.Module:
    """The causal LM of `config` in `dtype`, evaluation mode.

    real: initialised with transformers' random weights; otherwise parameters are on the meta
    device. Raises UserError when the class cannot be built.
    """
    from transformers import AutoModelForCausalLM

    context = contextlib.nullcontext() if real else meta_parameters()
    try:
        with context:
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation="eager",
                trust_remote_code=trust_remote_code,
            )
    except _BUILD_ERRORS as error:
        line = str(error).strip().split("\n")[0]
        raise UserError(
            f"{type(config).__name__}: transformers cannot build the model: {line}"
        ) from error
    model.tie_weights()
    model.eval()
    assert isinstance(model, nn.Module)
    if "input_ids" not in inspect.signature(model.forward).parameters:
        raise UserError(f"{type(model).__name__} takes no input_ids; smelt compiles text models")
    return model


def fake_parameters(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace every meta parameter by a fake CPU tensor of `mode`, keeping ties."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, param in list(module._parameters.items()):
            if param is None:
                continue
            if id(param) not in made:
                with mode:
                    fake = torch.empty(param.shape, dtype=param.dtype, device="cpu")
                made[id(param)] = nn.Parameter(fake, requires_grad=False)
            module._parameters[name] = made[id(param)]

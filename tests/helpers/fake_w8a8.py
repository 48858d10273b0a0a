"""What Inductor makes of the 8-bit linears, norms and gates, on a machine without CUDA.

For a process of its own, without TRITON_INTERPRET (`python -m helpers.fake_w8a8` in tests/); prints
one JSON object. See fake_cuda.py.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter

import torch
from helpers import fake_cuda
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from smelt.runtime.kernels.gpu import linear_fp8, linear_fp8_weight, linear_w8a8, norms, quantize

OPS = torch.ops.smelt
# So that their operators are defined.
MODULES = (linear_fp8, linear_fp8_weight, linear_w8a8, norms, quantize)


class Layer(torch.nn.Module):
    """Each operator once: ten kernels, since two linears are split along K."""

    def forward(
        self,
        x: torch.Tensor,
        weight8: torch.Tensor,
        scales8: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        q, s = OPS.quantize_int8_triton(x, None)
        a = OPS.linear_w8a8_triton(q, s, weight8, scales8, None, None, "silu", "bf16", 16)
        q, s = OPS.quantize_fp8_triton(x, None, 128)
        rest = (q, s, weight, scales, None, None)
        b = OPS.linear_fp8_triton(*rest, "", 128, "bf16", 0)
        c, d = OPS.linear_fp8_requantized_triton(*rest, "silu", None, 128, 128, "bf16", 64)
        e = OPS.linear_fp8_weight_triton(x, weight, scales, None, b, "", 128, 16)
        f = OPS.add_rms_norm_int8_triton(x, x, None, 1e-5, 1.0, None)
        g, h = OPS.gated_activation_fp8_triton(*x.chunk(2, -1), "silu", None, 128)
        return a, b, c.view(torch.uint8), d, e, *f, g.view(torch.uint8), h


def main() -> None:
    warnings.simplefilter("ignore")
    fake_cuda.pretend()
    with FakeTensorMode(shape_env=ShapeEnv()):
        inputs = tuple(
            torch.empty(shape, dtype=dtype, device="cuda")
            for shape, dtype in (
                ((5, 1024), torch.bfloat16),
                ((512, 1024), torch.int8),
                ((512,), torch.float32),
                ((512, 1024), torch.float8_e4m3fn),
                ((4, 8), torch.float32),
            )
        )
        tokens = torch.export.Dim("T", min=2, max=4096)
        shapes = ({0: tokens}, None, None, None, None)
        program = torch.export.export(Layer(), inputs, dynamic_shapes=shapes, strict=False)
    values = {n.name: n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"}
    given = tuple(values[name] for name in program.graph_signature.user_inputs)
    program._example_inputs = (given, {})
    graph = fake_cuda.inductor_graph(program)
    counts = Counter(getattr(n.target, "__name__", str(n.target)) for n in graph.nodes)
    copies = [n.name for n in graph.nodes if n.name.startswith(("clone", "copy"))]
    kernels = counts["triton_kernel_wrapper_mutation"]
    functional = counts["triton_kernel_wrapper_functional"]
    print(json.dumps({"kernels": kernels, "functional": functional, "copied": copies}))


if __name__ == "__main__":
    main()

"""What Inductor makes of a CUDA step, found on a machine without CUDA.

torch believes in a device of capability 9.0, all tensors are fake, and Inductor is stopped once its
graph passes are done: whether a cache or a weight would be copied can be read off that graph. Meant
for a process of its own (`python -m helpers.fake_cuda int4 few` in tests/), which prints one JSON
object; nothing here is undone.
"""

from __future__ import annotations

import json
import sys
import types
import warnings
from collections import Counter
from typing import Any

import torch
import triton
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from triton.backends.compiler import GPUTarget

from smelt.compiler import lower
from smelt.compiler.manager import PassManager
from smelt.compiler.pipeline import PipelineConfig, pipeline
from smelt.compiler.quantization import stage_for
from smelt.passes.quantize.spec import QuantSpec

PROPERTIES = types.SimpleNamespace(
    name="fake",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=140 << 30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    L2_cache_size=60 << 20,
    gcnArchName="",
)
SPECS = {
    "none": None,
    "int4": QuantSpec("rtn", "int4", 32),
    "int8": QuantSpec("rtn", "int8"),
    "w8a8": QuantSpec("smoothquant", alpha=0.0),
    "fp8": QuantSpec("fp8"),
}


class Driver:
    """What triton asks of its driver while kernels are only analysed."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


class Seen(Exception):
    """Inductor's graph passes are done."""

    def __init__(self, graph: torch.fx.Graph) -> None:
        super().__init__()
        self.graph = graph


def pretend() -> None:
    """Make torch believe in a CUDA device."""
    cuda: Any = torch.cuda
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": PROPERTIES,
        "get_device_capability": (9, 0),
        "is_initialized": True,
        "_lazy_init": None,
        "set_device": None,
        "synchronize": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
    }.items():
        setattr(cuda, name, lambda *_, value=value, **__: value)
    torch._C._cuda_getDevice = lambda: 0  # type: ignore[attr-defined]
    triton.runtime.driver.set_active(Driver())  # type: ignore[arg-type]

    import torch._inductor.compile_fx as compile_fx
    import torch._inductor.fx_passes.joint_graph as joint_graph
    import torch._inductor.fx_passes.post_grad as post_grad

    # Patterns are traced on real tensors of the device.
    joint_graph.lazy_init = post_grad.lazy_init = lambda *_, **__: None  # type: ignore[assignment]
    passes = compile_fx._recursive_post_grad_passes

    def stop(gm: torch.fx.GraphModule, *args: Any, **named: Any) -> None:
        passes(gm, *args, **named)
        raise Seen(gm.graph)

    compile_fx._recursive_post_grad_passes = stop


def exported_step(name: str, bounds: str) -> Any:
    """The tiny Llama's step in a format, for CUDA, exported with fake weights and inputs."""
    from helpers.tiny import tiny_program

    program = tiny_program("llama").program
    program.target = "cuda"
    spec = SPECS[name]
    stages = pipeline(PipelineConfig("O2", stage_for(spec) if spec else None))
    PassManager(stages).run(program)
    inputs = lower.example_inputs

    def fakes(spec: Any, device: str) -> tuple[torch.Tensor, ...]:
        given = inputs(spec, "cpu")
        return tuple(torch.empty(x.shape, dtype=x.dtype, device=device) for x in given)

    lower.example_inputs = fakes
    assert program.caches is not None
    with FakeTensorMode(shape_env=ShapeEnv()):
        module, _ = lower.step_module(program)
        lower.bound_step(module, *lower.BOUNDS[bounds])
        exported = lower.export_step(module, program.caches, "cuda")
    values = {n.name: n.meta["val"] for n in exported.graph.nodes if n.op == "placeholder"}
    for input_name, parameter in exported.graph_signature.inputs_to_parameters.items():
        fake = torch.nn.Parameter(values[input_name], requires_grad=False)
        exported._state_dict[parameter] = fake
    given = tuple(values[n] for n in exported.graph_signature.user_inputs)
    exported._example_inputs = (given, {})
    for node in exported.graph.nodes:
        # Its decomposition indexes a tensor in Python, which wants a real device.
        if node.target is torch.ops.aten.index_select.default:
            x, dim, index = node.args
            node.target, node.args = torch.ops.aten.index.Tensor, (x, [None] * dim + [index])
    exported.graph_module.recompile()
    return exported


def inductor_graph(exported: Any) -> torch.fx.Graph:
    """The graph that Inductor would generate code for."""
    options = {"aot_inductor.package_constants_in_so": False, "always_keep_tensor_constants": True}
    try:
        torch._inductor.aoti_compile_and_package(exported, inductor_configs=options)
    except Exception as error:
        found: BaseException | None = error
        while found is not None and not isinstance(found, Seen):
            found = found.__cause__ or found.__context__
        if found is None:
            raise
        return found.graph
    raise RuntimeError("Inductor came to its end")


def main() -> None:
    warnings.simplefilter("ignore")
    pretend()
    graph = inductor_graph(exported_step(sys.argv[1], sys.argv[2]))
    counts = Counter(getattr(n.target, "__name__", str(n.target)) for n in graph.nodes)
    inputs = {n for n in graph.nodes if n.op in ("placeholder", "get_attr")}
    clones = (torch.ops.aten.clone.default, torch.ops.aten.copy_.default)
    copied = [n.name for n in graph.nodes if n.target in clones and inputs & {*n.args}]
    kernels = counts["triton_kernel_wrapper_mutation"]
    functional = counts["triton_kernel_wrapper_functional"]
    print(json.dumps({"kernels": kernels, "functional": functional, "copied": copied}))


if __name__ == "__main__":
    main()

"""Canaries through AOTInductor: what the design found out about caches, weights and sizes of 1.

One package is compiled for all of them: a layer of attention over a paged cache, its embedding tied
to the output layer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers.check_pass import logits_of
from helpers.steps import Stepper
from helpers.tiny import Subject, Toy, program_of
from torch import nn

from smelt.compiler import lower
from smelt.compiler.manager import PassManager
from smelt.compiler.pipeline import PipelineConfig, pipeline
from smelt.passes.program import Program
from smelt.runtime.batch import CacheSpec, no_tree, step_input_names
from smelt.runtime.package import Package, PackageError

H, G, D = 4, 2, 4


class Layer(Toy):
    """One layer: fused projection, a window of 6 tokens, tied embeddings."""

    def __init__(self) -> None:
        super().__init__(layers=1)
        self.head.weight = self.embed.weight
        self.qkv = nn.Linear(16, (H + 2 * G) * D)
        self.out = nn.Linear(16, 16, bias=False)

    def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = x + torch.sin(positions[..., None] * 0.1)
        q, k, v = self.qkv(x)[0].view(-1, H + 2 * G, D).split((H, G, G), 1)
        attended = torch.ops.smelt.attention(q, k, v, D**-0.5, 6, 0.0, None)
        return x + self.out(attended.reshape(1, -1, H * D))


@dataclass
class Compiled:
    """A package in the place of a program: what `Stepper` needs of one."""

    subject: Subject
    path: Path
    constants: dict[str, str]
    weights: dict[str, torch.Tensor]
    package: Package

    @property
    def caches(self) -> CacheSpec:
        assert self.subject.program.caches is not None
        return self.subject.program.caches

    def run(
        self, values: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        return self.package.run([values[name] for name in step_input_names(self.caches)])


def references(program: Program) -> Program:
    """The whole pipeline, every operator computed by its reference: no kernel is needed."""
    overrides = (("linear", "reference"), ("cached_attention", "reference"))
    options = {"choose-providers": {"overrides": overrides}, "insert-kv-cache": {"block_size": 4}}
    return PassManager(pipeline(PipelineConfig(options=options))).run(program)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    subject = program_of(Layer())
    program = references(subject.program)
    folder = tmp_path_factory.mktemp("package")
    module, constants = lower.step_module(program)
    assert program.caches is not None
    exported = lower.export_step(module, program.caches, "cpu")
    lower.compile_package(exported, folder / "step.pt2", folder / "compile.log")
    planned = dict(program.weights.materialize(program.used_weights(), subject.source))
    weights = {name: planned[tensor] for name, tensor in constants.items()}
    package = Package(folder / "step.pt2", weights)
    return Compiled(subject, folder / "step.pt2", constants, weights, package)


def sequences(*lengths: int) -> list[torch.Tensor]:
    return [torch.arange(n) * 7 % 37 for n in lengths]


def both(compiled: Compiled, ids: list[torch.Tensor]) -> tuple[Stepper, Stepper]:
    program, source = compiled.subject.program, compiled.subject.source
    weights = dict(program.weights.materialize(program.used_weights(), source))
    eager, package = Stepper(program, weights, ids), Stepper(compiled, {}, ids)  # type: ignore[arg-type]
    for one, other in zip(eager.caches, package.caches, strict=True):
        other.copy_(one)
    return eager, package


@pytest.mark.parametrize("pool", [1, 3, 40], ids=lambda n: f"{n} sequences' blocks")
def test_logits_and_caches_equal_eager_whatever_the_pool(compiled: Compiled, pool: int) -> None:
    """The cache is a mutated input with a symbolic number of blocks: K and V must land where eager
    puts them (pytorch issue 198068), in blocks that are neither first nor in order."""
    ids = sequences(*([13] * pool))
    eager, package = both(compiled, ids)
    plans = [{0: 9}, {0: 1}, {0: 3}]
    if pool > 2:
        plans = [{0: 9, 2: 4}, {1: 13}, {0: 1, 2: 1, 1: 0}, {0: 3, 2: 8}]
    for chunks in plans:
        chunks = {b: n for b, n in chunks.items() if n}
        expected, found = eager.step(chunks), package.step(chunks)
        for b in chunks:
            torch.testing.assert_close(found[b], expected[b], atol=1e-5, rtol=1e-5)
        for one, other in zip(eager.caches, package.caches, strict=True):
            torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-6)


def step_of_one(compiled: Compiled, rows: int) -> torch.Tensor:
    spec = compiled.caches
    values = {
        "input_ids": torch.tensor([5]),
        "position_ids": torch.tensor([0]),
        "query_start": torch.tensor([0, 1], dtype=torch.int32),
        "tree_mask": no_tree(1),
        "seq_lens": torch.tensor([1], dtype=torch.int32),
        "logits_rows": torch.zeros(rows, dtype=torch.int64),
        "slot_mapping_0": torch.tensor([0]),
        "block_tables_0": torch.zeros(1, 1, dtype=torch.int32),
        "kv_cache_0": spec.allocate(1)[0],
    }
    return compiled.run(values, {})


def test_sizes_of_one_and_of_zero_rows(compiled: Compiled) -> None:
    """Exported at T = 8, B = 3, M = 5, R = 2 and 7 blocks; all may be 1, and R may be 0."""
    subject = compiled.subject
    expected = logits_of(subject.program, subject.source, torch.tensor([5]))
    torch.testing.assert_close(step_of_one(compiled, 1), expected, atol=1e-5, rtol=1e-5)
    assert step_of_one(compiled, 0).shape == (0, expected.shape[1])
    assert step_of_one(compiled, 3).shape == (3, expected.shape[1])


def test_a_token_without_a_slot_is_not_written(compiled: Compiled) -> None:
    spec = compiled.caches
    cache = torch.full_like(spec.allocate(2)[0], 3.0)
    values = {
        "input_ids": torch.tensor([5, 6]),
        "position_ids": torch.tensor([0, 0]),
        "query_start": torch.tensor([0, 1], dtype=torch.int32),
        "tree_mask": no_tree(1),
        "seq_lens": torch.tensor([1], dtype=torch.int32),
        "logits_rows": torch.tensor([0]),
        "slot_mapping_0": torch.tensor([4, -1]),
        "block_tables_0": torch.tensor([[1]], dtype=torch.int32),
        "kv_cache_0": cache,
    }
    compiled.run(values, {})
    written = (cache != 3.0).flatten(2).any(-1)
    assert written.tolist() == [[False, False], [True, True]]
    assert (cache[1, :, 1:] == 3.0).all()


def test_tied_weights_are_one_constant(compiled: Compiled) -> None:
    tied = [t for t in compiled.constants.values() if t in ("embed.weight", "head.weight")]
    assert len(tied) == 1
    assert len(compiled.constants) == len(set(compiled.constants.values())) == 4


def test_weights_are_used_in_place(compiled: Compiled) -> None:
    """A weight changed after it was bound changes the logits: nothing was copied."""
    name = next(n for n, tensor in compiled.constants.items() if tensor == "out.weight")
    weight = compiled.weights[name]
    before, saved = step_of_one(compiled, 1), weight.clone()
    weight.zero_()
    changed = step_of_one(compiled, 1)
    weight.copy_(saved)
    assert (before - changed).abs().max() > 1e-3
    assert torch.equal(step_of_one(compiled, 1), before)


def test_unaligned_weights_can_be_bound(compiled: Compiled) -> None:
    """A tensor in a mapped safetensors file starts at any byte that its dtype allows."""
    moved = {}
    for name, weight in compiled.weights.items():
        buffer = torch.empty(weight.numel() + 1)
        moved[name] = buffer[1:].view(weight.shape).copy_(weight)
        assert moved[name].data_ptr() % 16
    other = Compiled(
        compiled.subject,
        compiled.path,
        compiled.constants,
        moved,
        Package(compiled.path, moved),
    )
    torch.testing.assert_close(step_of_one(other, 1), step_of_one(compiled, 1))


@pytest.fixture
def peak() -> Iterator[Path]:
    """/proc/self/status, with the highest memory use of this process reset to what it is now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the peak of memory use cannot be reset here")
    yield Path("/proc/self/status")


def kib(status: Path, key: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])


def test_a_step_does_not_copy_the_cache(compiled: Compiled, peak: Path) -> None:
    """A pool of half a gibibyte that no page of exists yet: a copy of it would be seen."""
    step_of_one(compiled, 1)
    blocks = (512 << 20) // (2 * 4 * G * D * 4)
    cache = torch.empty(blocks, 2, 4, G, D)
    values = {
        "input_ids": torch.tensor([5]),
        "position_ids": torch.tensor([0]),
        "query_start": torch.tensor([0, 1], dtype=torch.int32),
        "tree_mask": no_tree(1),
        "seq_lens": torch.tensor([1], dtype=torch.int32),
        "logits_rows": torch.tensor([0]),
        "slot_mapping_0": torch.tensor([(blocks - 1) * 4]),
        "block_tables_0": torch.tensor([[blocks - 1]], dtype=torch.int32),
        "kv_cache_0": cache,
    }
    Path("/proc/self/clear_refs").write_text("5")
    before = kib(peak, "VmRSS")
    found = compiled.run(values, {})
    assert kib(peak, "VmHWM") - before < 128 << 10, "the step copied its cache"
    torch.testing.assert_close(found, step_of_one(compiled, 1))


def test_a_missing_weight_is_named(compiled: Compiled) -> None:
    name = next(iter(compiled.weights))
    fewer = {n: w for n, w in compiled.weights.items() if n != name}
    with pytest.raises(PackageError, match=f"step.pt2 wants weight {name}, which the artifact"):
        Package(compiled.path, fewer)


def test_the_package_holds_no_weights(compiled: Compiled) -> None:
    import zipfile

    with zipfile.ZipFile(compiled.path) as archive:
        names = archive.namelist()
    assert not any(
        name.endswith((".bin", "_weights.blob")) or "data/weights/w" in name for name in names
    )


def test_compiler_output_goes_to_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import torch._inductor

    def noisy(*_: object, **__: object) -> None:
        os.write(1, b"g++: 300 lines\n")
        raise RuntimeError("\nIn file included\nstep.cpp:3: error: expected ';'\nmore\n")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", noisy)
    log = tmp_path / "logs" / "compile.log"
    with pytest.raises(lower.LowerError) as caught:
        lower.compile_package(None, tmp_path / "step.pt2", log)  # type: ignore[arg-type]
    text = str(caught.value)
    assert "AOTInductor failed: step.cpp:3: error: expected ';'" in text and str(log) in text
    assert "\n" not in text and "--backend eager" in text
    assert log.read_text() == "g++: 300 lines\n"
    assert capfd.readouterr().out == ""


def test_inputs_are_in_the_contracts_order_and_weights_are_parameters() -> None:
    program = references(program_of(Layer()).program)
    module, constants = lower.step_module(program)
    assert program.caches is not None
    inputs = [node.target for node in module.graph.nodes if node.op == "placeholder"]
    assert inputs == step_input_names(program.caches)
    assert dict(module.named_parameters()).keys() == constants.keys()
    assert set(constants.values()) == set(program.used_weights())


def test_names_that_read_alike_stay_apart() -> None:
    program = references(program_of(Layer()).program)
    linear = program.calls(torch.ops.aten.linear.default)[0]
    for name in ("a.b", "a_b"):
        program.weights.put(name, torch.zeros(16))
        with program.graph.inserting_before(linear):
            x = linear.args[0]
            new = program.call(torch.ops.aten.add.Tensor, (x, program.weight(name)), like=linear)
        linear.replace_input_with(x, new)
    program.clean()
    _, constants = lower.step_module(program)
    assert {"a.b", "a_b"} <= set(constants.values())
    assert len(constants) == len(set(constants.values()))


def test_an_export_that_fails_is_one_line() -> None:
    class Broken(nn.Module):
        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            if inputs[0].sum() > 0:
                return inputs[0]
            return inputs[1]

    program = references(program_of(Layer()).program)
    assert program.caches is not None
    with pytest.raises(lower.LowerError, match="the lowered graph does not export: ") as caught:
        lower.export_step(Broken(), program.caches, "cpu")
    assert "\n" not in str(caught.value)

"""`--check-numerics`: after every pass, compare the program's logits with the traced program's."""

from __future__ import annotations

import torch

from smelt.passes.base import Close, Exact, Lossy, Pass
from smelt.passes.program import Program
from smelt.passes.weights import TensorSource
from smelt.runtime.batch import CacheSpec, no_tree

from .manager import PassError

TOKENS = 32
# In 16 bit every rounding differs: an exact or close pass may move the distribution this far.
HALF_KL = 5e-3


def step_values(program: Program, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs by name that run `ids` [T] as one whole sequence, whatever the program's dialect."""
    if program.caches is not None:
        return spec_values(program.caches, ids)
    rows = torch.arange(ids.shape[0])
    return {"input_ids": ids, "position_ids": rows, "logits_rows": rows}


def spec_values(spec: CacheSpec, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The contract's inputs by name, with fresh caches, for `ids` [T] as one whole sequence."""
    count = ids.shape[0]
    values = {"input_ids": ids, "position_ids": torch.arange(count)}
    values["logits_rows"] = torch.arange(count)
    blocks = -(-count // spec.block_size)
    values["query_start"] = torch.tensor([0, count], dtype=torch.int32)
    values["seq_lens"] = torch.tensor([count], dtype=torch.int32)
    values["tree_mask"] = no_tree(count)
    if spec.rope is not None:
        values["rope_lens"] = torch.full((count,), count)
    for g in range(len(spec.groups)):
        values[f"slot_mapping_{g}"] = torch.arange(count)
        values[f"block_tables_{g}"] = torch.arange(blocks, dtype=torch.int32)[None]
    for i, cache in enumerate(spec.allocate(blocks)):
        values[f"kv_cache_{i}"] = cache
    return values


class NumericsCheck:
    """Holds the traced program's logits on a fixed batch; called after each pass.

    Weights are materialised anew for every pass, so this costs a pass over the checkpoint each
    time: it is for finding the pass that breaks a model, not for every compilation.
    """

    def __init__(self, program: Program, source: TensorSource) -> None:
        generator = torch.Generator().manual_seed(0)
        size = program.facts.vocab_size
        count = min(TOKENS, program.facts.max_position)
        self._ids = torch.randint(0, size, (count,), generator=generator)
        self._source = source
        self._reference = self._logits(program)

    def __call__(self, program: Program, pass_: Pass) -> dict[str, float]:
        """{max_abs, kl, top1} against the trace. Raises PassError outside the pass's promise."""
        logits = self._logits(program)
        measured = compare(logits, self._reference)
        if not _within(pass_, logits, self._reference, measured, program.facts.dtype):
            raise PassError(
                f"pass {pass_.name} promises {pass_.numerics} and moved the logits: "
                f"largest difference {measured['max_abs']:.3g}, KL {measured['kl']:.3g}, "
                f"top-1 agreement {measured['top1']:.3f}; compile with --skip {pass_.name}"
            )
        if isinstance(pass_.numerics, Lossy):
            # What was lost on purpose is not held against the passes that follow.
            self._reference = logits
        return measured

    def _logits(self, program: Program) -> torch.Tensor:
        weights = dict(program.weights.materialize(program.used_weights(), self._source))
        names = {program.inputs[n.name].name for n in program.placeholders()}
        values = {k: v for k, v in step_values(program, self._ids).items() if k in names}
        output = program.run(values, weights)
        logits: torch.Tensor = output[0] if isinstance(output, list | tuple) else output
        return logits.float()


def compare(logits: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Largest difference, mean KL(reference || logits) in nats, top-1 agreement. [T, V] each."""
    log_p = reference.log_softmax(-1)
    kl = (log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1).mean()
    return {
        "max_abs": (logits - reference).abs().max().item(),
        "kl": max(0.0, kl.item()),
        "top1": (logits.argmax(-1) == reference.argmax(-1)).float().mean().item(),
    }


def _within(
    pass_: Pass,
    logits: torch.Tensor,
    reference: torch.Tensor,
    measured: dict[str, float],
    dtype: str,
) -> bool:
    promise = pass_.numerics
    if isinstance(promise, Lossy):
        return measured["kl"] <= promise.max_kl and measured["top1"] >= promise.min_top1
    if dtype != "float32":
        return measured["kl"] <= HALF_KL
    if isinstance(promise, Close):
        return torch.allclose(logits, reference, atol=promise.atol, rtol=promise.rtol)
    # Exact passes may follow close ones, so the trace is the reference within the loosest promise
    # made so far; alone, an exact pass changes nothing and this is exact.
    assert isinstance(promise, Exact)
    return torch.allclose(logits, reference, atol=Close.atol, rtol=Close.rtol)

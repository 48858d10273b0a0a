"""Cases of attention over the paged cache, and of the kernel that writes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from smelt.runtime.kernels.gpu.roofline import Cost
from smelt.runtime.ops.attention import cached_attention, cached_attention_quantized
from smelt.runtime.ops.cache_format import quantize_rows
from smelt.runtime.ops.rope import rope

from .gpu_cases import BF16, Case, Goal, Maker, Model, Scale, Trial, kernel_module, operators
from .gpu_measure import Call

BLOCK_SIZE = 16
# Sequences with at most so many tokens in a step are the decode kernel's.
DECODE_TOKENS = 16


@dataclass(frozen=True)
class Step:
    """What a step attends over. counts: tokens a sequence brings; lengths: it has then."""

    counts: tuple[int, ...]
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    head: int
    format: str = "auto"
    block_size: int = BLOCK_SIZE
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    tree: bool = False

    @property
    def scale(self) -> float:
        return self.head**-0.5

    @property
    def even(self) -> bool:
        """Whether all sequences are alike, so that plain attention over a batch computes it."""
        return len(set(self.counts)) == len(set(self.lengths)) == 1 and not self.tree

    def __str__(self) -> str:
        longest, most = max(self.lengths), max(self.counts)
        parts = [
            f"{len(self.counts)} x {most} tokens at {longest}",
            f"H {self.heads}/{self.kv_heads}",
        ]
        parts += [f"D {self.head}", "bf16" if self.format == "auto" else self.format]
        parts += [f"blocks of {self.block_size}"] if self.block_size != BLOCK_SIZE else []
        parts += [f"window {self.window}"] if self.window else []
        parts += ["softcap"] if self.softcap else []
        parts += ["sinks"] if self.sinks else []
        parts += ["tree"] if self.tree else []
        parts += [] if len(set(self.lengths)) == 1 else ["uneven"]
        return ", ".join(parts)


@dataclass
class Tensors:
    """A step's tensors. keys and values: float [B, G, L, D] where all sequences are alike."""

    q: torch.Tensor
    cache: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    table: torch.Tensor
    sinks: torch.Tensor | None
    tree: torch.Tensor | None


def _tensors(step: Step, maker: Maker) -> Tensors:
    taken = [-(-length // step.block_size) for length in step.lengths]
    order = maker.permutation(sum(taken)).to(torch.int32)
    table = maker.tensor([[0] * max(taken)] * len(taken), torch.int32)
    first = 0
    for b, count in enumerate(taken):
        table[b, :count] = order[first : first + count]
        first += count
    shape = (sum(taken), 2, step.block_size, step.kv_heads, step.head)
    cache = maker.normal(*shape)
    if step.format != "auto":
        parts = [quantize_rows(part, step.format) for part in cache.split(4096)]
        cache = torch.cat(parts).contiguous()
    starts = [0]
    for count in step.counts:
        starts.append(starts[-1] + count)
    tree = None
    if step.tree:
        widest = max(step.counts)
        tree = torch.zeros(starts[-1], widest, dtype=torch.bool, device=maker.device)
        for b, count in enumerate(step.counts):
            # Two branches: each token sees itself and every second one before it.
            for i in range(count):
                tree[starts[b] + i, i % 2 : i + 1 : 2] = True
    return Tensors(
        maker.normal(starts[-1], step.heads, step.head),
        cache,
        maker.tensor(starts, torch.int32),
        maker.tensor(step.lengths, torch.int32),
        table,
        maker.normal(step.heads) if step.sinks else None,
        tree,
    )


def _reference(step: Step, at: Tensors) -> torch.Tensor:
    """float32 [T, H, D], over the cache as it is."""
    tokens = at.q.shape[0]
    nothing = torch.zeros(tokens, step.kv_heads, step.head, device=at.q.device)
    slots = torch.full((tokens,), -1, device=at.q.device)
    given = (at.q.float(), nothing, nothing, at.cache, slots, at.query_start, at.seq_lens, at.table)
    rest = (step.scale, step.window, step.softcap, at.sinks, at.tree)
    if step.format == "auto":
        return cached_attention(*given, *rest)
    return cached_attention_quantized(*given, *rest, step.format)


def _attention(step: Step, maker: Maker) -> Trial:
    ops, at = operators("attention"), _tensors(step, maker)
    most = max(step.counts)
    bound = DECODE_TOKENS if most <= DECODE_TOKENS else 0

    def run() -> torch.Tensor:
        found: torch.Tensor = ops.paged_attention_triton(
            *(at.q, at.cache, at.query_start, at.seq_lens, at.table, step.scale, step.window),
            *(step.softcap, at.sinks, at.tree, step.format, step.kv_heads, bound),
        )
        return found

    def cost() -> Cost:
        module = kernel_module("attention")
        sizes = (step.heads, step.kv_heads, step.head, step.block_size, step.format)
        before = [length - new for length, new in zip(step.lengths, step.counts, strict=True)]
        shape = kernel_module("attention_shapes").Shape(*sizes)
        found: Cost = module.cost(before, step.counts, shape, step.window)
        return found

    peers: dict[str, Callable[[], Call]] = {}
    if step.even and step.format == "auto" and not (step.window or step.softcap or step.sinks):
        peers = {
            "sdpa": partial(_sdpa, step, at),
            "flex_attention": partial(_flex, step, at),
            "flashinfer": partial(_flashinfer, step, at),
        }
    return Trial(run, cost, lambda: _reference(step, at), peers=peers)


def _dense(step: Step, at: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [B, H, N, D], k and v [B, G, L, D], as attention without pages wants them."""
    length, batch = step.lengths[0], len(step.lengths)
    blocks = at.cache[at.table.long()].transpose(1, 2)  # [B, 2, M, block_size, G, D]
    rows = blocks.flatten(2, 3)[:, :, :length].transpose(2, 3).contiguous()
    q = at.q.view(batch, step.counts[0], step.heads, step.head).transpose(1, 2).contiguous()
    return q, rows[:, 0], rows[:, 1]


def _sdpa(step: Step, at: Tensors) -> Call:
    from torch.nn.attention.bias import causal_lower_right

    q, k, v = _dense(step, at)
    count, length = step.counts[0], step.lengths[0]
    if count == 1:
        return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    if count == length:
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    mask = causal_lower_right(count, length)
    return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def _flex(step: Step, at: Tensors) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = _dense(step, at)
    count, length = step.counts[0], step.lengths[0]
    backend = "inductor" if q.is_cuda else "eager"
    attend: Any = torch.compile(flex_attention, backend=backend, dynamic=False)
    if count == 1:
        return lambda: attend(q, k, v, enable_gqa=True)
    before = length - count

    def causal(b: Any, h: Any, row: Any, key: Any) -> Any:
        return row + before >= key

    mask = create_block_mask(causal, None, None, count, length, device=q.device)
    return lambda: attend(q, k, v, block_mask=mask, enable_gqa=True)


def _flashinfer(step: Step, at: Tensors) -> Call:
    import flashinfer

    taken = [-(-length // step.block_size) for length in step.lengths]
    starts = [0]
    for count in taken:
        starts.append(starts[-1] + count)
    device = at.q.device
    begins = torch.tensor(starts, dtype=torch.int32, device=device)
    blocks = torch.cat([at.table[b, :count] for b, count in enumerate(taken)])
    last = [(length - 1) % step.block_size + 1 for length in step.lengths]
    ends = torch.tensor(last, dtype=torch.int32, device=device)
    space = torch.empty(128 << 20, dtype=torch.uint8, device=device)
    sizes = (step.heads, step.kv_heads, step.head, step.block_size)
    if max(step.counts) == 1:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "NHD", use_tensor_cores=True)
        wrapper.plan(begins, blocks, ends, *sizes, q_data_type=BF16, kv_data_type=BF16)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(space, "NHD")
        wrapper.plan(at.query_start, begins, blocks, ends, *sizes, causal=True, q_data_type=BF16)
    return lambda: wrapper.run(at.q, at.cache)


def _kv_write(model: Model, tokens: int, form: str, maker: Maker) -> Trial:
    ops, module = operators("kv_write"), kernel_module("kv_write")
    heads, groups, size = model.heads, model.kv_heads, model.head
    fused = maker.normal(tokens, heads + 2 * groups, size)
    q, k, v = fused.split((heads, groups, groups), 1)
    cos, sin = (maker.uniform(tokens, size, low=-1.0, dtype=BF16) for _ in range(2))
    blocks = tokens // BLOCK_SIZE + 2
    cache = maker.normal(blocks, 2, BLOCK_SIZE, groups, size)
    if form != "auto":
        cache = quantize_rows(cache, form)
    slots = maker.permutation(blocks * BLOCK_SIZE)[:tokens]
    before = cache.clone()

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        return ops.rope_write_triton(q, k, v, cos, sin, cache, slots, False, form), cache

    def reference() -> tuple[torch.Tensor, torch.Tensor]:
        # On the CPU: a GPU divides by a Python number through its reciprocal.
        own_q, own_k, own_v, c, s, at = (x.cpu() for x in (q, k, v, cos, sin, slots))
        expected = before.cpu()
        for which, rows in enumerate((rope(own_k, c, s, False), own_v)):
            rows = rows if form == "auto" else quantize_rows(rows, form)
            expected[at // BLOCK_SIZE, which, at % BLOCK_SIZE] = rows
        return rope(own_q, c, s, False), expected

    def cost() -> Cost:
        found: Cost = module.cost(tokens, heads, groups, size, size, form)
        return found

    return Trial(run, cost, reference, tolerance=0.0, exact=True)


def _case(step: Step, goal: Goal | None = None, timed: bool = True) -> Case:
    kind = "decode" if max(step.counts) <= DECODE_TOKENS else "prefill"
    make = partial(_attention, step)
    return Case("attention", f"attention_{kind}", str(step), make, goal, timed)


def attention_cases(scale: Scale) -> Iterator[Case]:
    """Decoding at 32k first."""
    model = scale.llama
    sizes = (model.heads, model.kv_heads, model.head)
    goal = Goal("bound", 0.85)

    def decode(batch: int, context: int, **how: Any) -> Step:
        counts, lengths = (1,) * batch, (scale.tokens(context),) * batch
        return Step(counts, lengths, *sizes, **how)

    def prefill(new: int, length: int, **how: Any) -> Step:
        return Step((scale.tokens(new),), (scale.tokens(length),), *sizes, **how)

    some = 2 if scale.small else 8
    yield _case(decode(1, 32768), goal)
    yield _case(decode(some, 32768), goal)
    yield _case(prefill(2048, 2048))
    yield _case(decode(4 if scale.small else 64, 2048))
    for form in ("fp8", "int8", "int4"):
        yield _case(decode(some, 32768, format=form))
    yield _case(prefill(512, 8192))
    yield _case(decode(1, 2048))
    yield _case(decode(some, 32768, window=scale.tokens(4096)))
    yield _case(decode(1, 32768, format="fp8"))
    yield _case(prefill(2048, 2048, format="fp8"))
    yield from _checks(sizes)
    for form in ("auto", "fp8", "int4", "int8"):
        for tokens in (1, 64, 2048):
            count = scale.tokens(tokens)
            make = partial(_kv_write, model, count, form)
            name = "bf16" if form == "auto" else form
            timed = form in ("auto", "fp8")
            yield Case("attention", "rope_write", f"{count} tokens, {name}", make, None, timed)


def _checks(sizes: Sequence[int]) -> Iterator[Case]:
    """Small steps with everything an attention may have; for correctness alone."""
    heads, kv_heads, head = sizes
    mixed: dict[str, Any] = {"counts": (1, 3, 20, 1, 7), "lengths": (1, 40, 20, 133, 64)}
    few: dict[str, Any] = {"counts": (1, 3, 5), "lengths": (77, 3, 40)}
    steps = [
        Step(**mixed, heads=heads, kv_heads=kv_heads, head=head),
        Step(**few, heads=heads, kv_heads=kv_heads, head=head, tree=True),
        Step(**mixed, heads=4, kv_heads=4, head=64, window=17, block_size=32),
        Step(**few, heads=4, kv_heads=1, head=80, softcap=20.0),
        Step(**mixed, heads=8, kv_heads=2, head=256, sinks=True, block_size=64),
    ]
    for form in ("fp8", "int8", "int4"):
        steps.append(Step(**mixed, heads=heads, kv_heads=kv_heads, head=head, format=form))
    for step in steps:
        yield _case(step, timed=False)

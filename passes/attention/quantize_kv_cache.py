"""Hold the paged key/value cache in 8 or 4 bits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from smelt.runtime.errors import UserError
from smelt.runtime.ops.cache_format import QUANTIZED

from ..base import Lossy, Pass, PassResult
from ..program import Dialect, Program


@dataclass(frozen=True)
class QuantizeKvCacheOptions:
    """format: "int8", "int4" or "fp8". Raises UserError for another."""

    format: str = "int8"

    def __post_init__(self) -> None:
        if self.format not in QUANTIZED:
            raise UserError(
                f"quantize-kv-cache: no format {self.format!r}; it knows {', '.join(QUANTIZED)}"
            )


class QuantizeKvCache(Pass):
    """The cache operator writes keys and values rounded, and attends over what it wrote.

    Before                                      After
        o = smelt.cached_attention(q, k, v,         o = smelt.cached_attention_quantized(q, k, v,
                kv_cache_i, ...)                            kv_cache_i, ..., "int8")
        kv_cache_i: bfloat16                        kv_cache_i: uint8
            [blocks, 2, block_size, G, D]               [blocks, 2, block_size, G, D + 4]

    Every key and value of a head and token is rounded by a scale and a minimum of its own, which
    lie behind it in the slot (runtime/ops/cache_format.py has formats and formulas), so nothing is
    calibrated and weights of any scheme go with it. Legal for every attention. It pays in memory:
    1.94 (int8) or 3.76 (int4) times the tokens of long contexts and many sequences fit. It does not
    pay in time where the cache is small: dequantizing costs more than reading 16 bits that lie in
    the processor's cache. Lossy: int8 moves the logits hardly at all, int4 visibly
    (docs/quantization.md).
    """

    name = "quantize-kv-cache"
    summary = "the paged cache holds 8 or 4 bits a value, with scales a head and token"
    requires = Dialect.CACHED
    after = ("insert-kv-cache",)
    numerics = Lossy()
    Options = QuantizeKvCacheOptions

    def expect(self, program: Program) -> int | None:
        return program.facts.hidden_layers

    def run(self, program: Program, options: QuantizeKvCacheOptions) -> PassResult:
        result = PassResult()
        nodes = program.calls(torch.ops.smelt.cached_attention.default)
        if not nodes or program.caches is None:
            return result
        before = program.caches.bytes_per_token()
        program.caches = replace(program.caches, dtype="uint8", format=options.format)
        for i, (_, *rest) in enumerate(program.caches.shapes(0)):
            cache = program.input(f"kv_cache_{i}")
            hint = (7, *rest)
            cache.meta["val"] = program.dynamic_input(hint, torch.uint8, (0,), f"kv_cache_{i}")
        for node in nodes:
            with program.graph.inserting_before(node):
                new = program.call(
                    torch.ops.smelt.cached_attention_quantized.default,
                    (*node.args, options.format),
                    like=node,
                )
            program.replace(node, new)
            program.graph.erase_node(node)
            result.matched += 1
            result.rewritten += 1
        after = program.caches.bytes_per_token()
        text = f"KV cache {options.format}: {before} -> {after} bytes a token"
        result.notes.append({"summary": f"{text} ({before / after:.2f}x fewer)"})
        return result

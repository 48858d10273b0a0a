"""Put the paged key/value cache into the graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from smelt.runtime.batch import CacheGroup, CacheSpec

from ..base import Exact, Pass, PassResult
from ..program import Dialect, Program, Role
from ..rewrite import dtype, shape


@dataclass(frozen=True)
class KvCacheOptions:
    """block_size: tokens a cache block holds."""

    block_size: int = 16


class InsertKvCache(Pass):
    """Attention over one sequence becomes attention over the paged cache.

    Before                                      After
        o = smelt.attention(q, k, v, ...)           o = smelt.cached_attention(q, k, v, kv_cache_i,
                                                        slot_mapping_g, query_start, seq_lens,
                                                        block_tables_g, ..., tree_mask)

    The caches become graph inputs, one tensor a layer, each mutated by its one reader: a cache
    operator must take the input itself and do its own indexing, because Inductor drops the offset
    of a mutated view (pytorch issue 198068) and copies the cache for an index write. Layers of one
    window share a block table, so that the engine can free what a window no longer reaches. Exact:
    for one sequence the same products are summed.
    """

    name = "insert-kv-cache"
    summary = "attention reads and writes a paged cache; caches and block tables become inputs"
    produces = Dialect.CACHED
    after = ("canonicalize-rope", "keep-logits-rows")
    numerics = Exact()
    Options = KvCacheOptions

    def expect(self, program: Program) -> int | None:
        return program.facts.hidden_layers

    def run(self, program: Program, options: KvCacheOptions) -> PassResult:
        result = PassResult()
        nodes = program.calls(torch.ops.smelt.attention.default)
        if not nodes:
            return result
        windows = [int(node.args[4]) for node in nodes]  # type: ignore[arg-type]
        sizes = sorted(set(windows))
        program.caches = CacheSpec(
            block_size=options.block_size,
            dtype=str(dtype(nodes[0].args[1])).removeprefix("torch."),
            heads=tuple(int(shape(node.args[1])[1]) for node in nodes),
            head_sizes=tuple(int(shape(node.args[1])[2]) for node in nodes),
            groups=tuple(
                CacheGroup(
                    f"window_{size}" if size else "full",
                    size,
                    tuple(i for i, w in enumerate(windows) if w == size),
                )
                for size in sizes
            ),
        )
        self._add_inputs(program, program.caches)
        for i, node in enumerate(nodes):
            group = sizes.index(windows[i])
            q, k, v, scale, window, softcap, sinks = node.args
            with program.graph.inserting_before(node):
                new = program.call(
                    torch.ops.smelt.cached_attention.default,
                    (
                        q,
                        k,
                        v,
                        program.input(f"kv_cache_{i}"),
                        program.input(f"slot_mapping_{group}"),
                        program.input("query_start"),
                        program.input("seq_lens"),
                        program.input(f"block_tables_{group}"),
                        scale,
                        window,
                        softcap,
                        sinks,
                        program.input("tree_mask"),
                    ),
                    like=node,
                )
            program.replace(node, new)
            program.graph.erase_node(node)
            result.matched += 1
            result.rewritten += 1
        return result

    def _add_inputs(self, program: Program, spec: CacheSpec) -> None:
        tokens = program.input("input_ids").meta["val"]

        def add(
            name: str, hint: tuple[int, ...], kind: torch.dtype, dynamic: tuple[int, ...]
        ) -> None:
            role = Role.CACHE if name.startswith("kv_cache") else Role.BATCH
            program.add_input(name, role, program.dynamic_input(hint, kind, dynamic, name))

        add("query_start", (4,), torch.int32, (0,))
        add("seq_lens", (3,), torch.int32, (0,))
        wide = program.dynamic_input((5,), torch.bool, (0,), "tree_mask")
        with program.fake_mode:
            mask = torch.empty((*tokens.shape, *wide.shape), dtype=torch.bool, device=tokens.device)
        program.add_input("tree_mask", Role.BATCH, mask)
        for g in range(len(spec.groups)):
            with program.fake_mode:
                slots = torch.empty_like(tokens)
            program.add_input(f"slot_mapping_{g}", Role.BATCH, slots)
            add(f"block_tables_{g}", (3, 5), torch.int32, (0, 1))
        for i in range(spec.layers):
            hint = (7, 2, spec.block_size, spec.heads[i], spec.head_sizes[i])
            add(f"kv_cache_{i}", hint, spec.torch_dtype, (0,))

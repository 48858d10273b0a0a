"""The contract between a compiled graph and the engine that feeds it.

A step takes the tokens of all sequences end to end ("packed"), with no batch and no padding
dimension. Letters used here and everywhere else: T tokens of this step, B sequences, R rows whose
logits are wanted, M cache blocks a sequence, G key/value heads, D head size, V vocabulary.

The KV-cache pass makes its graph inputs from `BatchLayout` and `CacheSpec`, the manifest stores
them, and the loader refuses a manifest whose contract differs from this file's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from .length_scaling import LengthScaling
from .ops.cache_format import CACHE_FORMATS, row_bytes

CONTRACT_VERSION = 3


class ContractError(ValueError):
    """A step's inputs or a manifest do not fit the contract; the text names the field."""


@dataclass(frozen=True)
class CacheGroup:
    """Layers that share one block table.

    window is 0 for full attention, otherwise the number of most recent tokens a layer sees, itself
    included; layers of one window size form one group so that the engine may free their old blocks.
    """

    name: str
    window: int
    layers: tuple[int, ...]


@dataclass(frozen=True)
class CacheSpec:
    """Shapes and dtype of the paged key/value cache.

    One tensor a layer, [blocks, 2, block_size, G, width]: index 0 of dimension 1 is K, 1 is V. The
    number of blocks is the engine's choice at load time. heads and head_sizes (D) are per layer.
    format: "auto" holds D elements of `dtype`; the others hold quantized rows, bytes with the
    row's scale behind them, in tensors of uint8 (runtime/ops/cache_format.py). rope: set where the
    keys depend on the length of their sequence, too; the step then takes `rope_lens`.

    Raises ContractError for a format that is not known or does not fit the dtype.
    """

    block_size: int
    dtype: str
    heads: tuple[int, ...]
    head_sizes: tuple[int, ...]
    groups: tuple[CacheGroup, ...]
    format: str = "auto"
    rope: LengthScaling | None = None

    def __post_init__(self) -> None:
        if self.format not in CACHE_FORMATS:
            raise ContractError(
                f"cache format {self.format!r} is not known; known: {', '.join(CACHE_FORMATS)}"
            )
        if (self.format != "auto") != (self.dtype == "uint8"):
            raise ContractError(f"a cache of format {self.format} cannot hold {self.dtype}")

    @property
    def layers(self) -> int:
        return len(self.heads)

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def shapes(self, blocks: int) -> list[tuple[int, int, int, int, int]]:
        """The shape of each layer's cache tensor with so many blocks."""
        itemsize = self.torch_dtype.itemsize
        return [
            (blocks, 2, self.block_size, g, row_bytes(d, self.format, self.torch_dtype) // itemsize)
            for g, d in zip(self.heads, self.head_sizes, strict=True)
        ]

    def bytes_per_token(self) -> int:
        """Bytes of K and V that one token takes over all layers, scales included."""
        return sum(
            2 * g * row_bytes(d, self.format, self.torch_dtype)
            for g, d in zip(self.heads, self.head_sizes, strict=True)
        )

    def allocate(self, blocks: int, device: str | torch.device = "cpu") -> list[torch.Tensor]:
        """One zeroed cache tensor a layer. Zeroed, so that a masked read is never NaN times 0."""
        return [
            torch.zeros(shape, dtype=self.torch_dtype, device=device)
            for shape in self.shapes(blocks)
        ]

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        if self.rope is None:  # written only where the contract has it
            del data["rope"]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CacheSpec:
        missing = [f.name for f in fields(cls) if f.name not in data and f.name != "rope"]
        if missing:
            raise ContractError(f"cache specification lacks {', '.join(missing)}")
        groups = tuple(
            CacheGroup(g["name"], int(g["window"]), tuple(g["layers"])) for g in data["groups"]
        )
        return cls(
            int(data["block_size"]),
            str(data["dtype"]),
            tuple(data["heads"]),
            tuple(data["head_sizes"]),
            groups,
            str(data["format"]),
            LengthScaling.from_json(data["rope"]) if data.get("rope") else None,
        )


FEATURES = ("none", "final", "eagle3")


@dataclass(frozen=True)
class Features:
    """The second output of a step, for trained speculation heads, in the dtype of the model.

    kind: "final" is what enters the output layer, [R, width], the rows of the logits; "eagle3" the
    residual streams behind each of `layers`, side by side, [T, width], all tokens. embedding,
    head: names of the artifact's weights [V, K] that turn tokens into rows and rows into logits,
    None where they are not kept in 16 bits and in plain order.

    Raises ContractError for a kind that is not known.
    """

    kind: str
    width: int
    layers: tuple[int, ...] = ()
    embedding: str | None = None
    head: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in FEATURES[1:]:
            raise ContractError(f"features {self.kind!r} are not known")

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "layers": list(self.layers)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Features:
        missing = [f.name for f in fields(cls) if f.name not in data]
        if missing:
            raise ContractError(f"features lack {', '.join(missing)}")
        names = (data["embedding"], data["head"])
        return cls(str(data["kind"]), int(data["width"]), tuple(data["layers"]), *names)


@dataclass(frozen=True)
class BatchLayout:
    """The largest sizes a step may have; AOTInductor does not check them, the engine does."""

    max_tokens: int
    max_sequences: int
    max_blocks: int
    max_rows: int
    max_position: int

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BatchLayout:
        missing = [f.name for f in fields(cls) if f.name not in data]
        if missing:
            raise ContractError(f"batch layout lacks {', '.join(missing)}")
        return cls(**{f.name: int(data[f.name]) for f in fields(cls)})


# Order in which a step's tensors enter the graph; slot_mapping and block_tables repeat per group,
# the caches follow, one a layer.
TOKEN_INPUTS = ("input_ids", "position_ids")
BATCH_INPUTS = ("query_start", "seq_lens", "tree_mask")
GROUP_INPUTS = ("slot_mapping", "block_tables")
ROW_INPUT = "logits_rows"
ROPE_INPUT = "rope_lens"  # only where `CacheSpec.rope` is set


def step_input_names(spec: CacheSpec) -> list[str]:
    """Names of the graph's inputs, in order, without weights."""
    names = batch_input_names(len(spec.groups), spec.rope is not None)
    return names + [f"kv_cache_{i}" for i in range(spec.layers)]


def batch_input_names(groups: int, rope: bool) -> list[str]:
    """Those of `step_input_names` that are no caches."""
    names = [*TOKEN_INPUTS, *BATCH_INPUTS]
    if rope:
        names.append(ROPE_INPUT)
    for i in range(groups):
        names += [f"{name}_{i}" for name in GROUP_INPUTS]
    return [*names, ROW_INPUT]


def no_tree(tokens: int) -> torch.Tensor:
    """The tree mask of a step in which every token sees all before it: bool [T, 0]."""
    return torch.empty(tokens, 0, dtype=torch.bool)


@dataclass
class Batch:
    """One step's inputs but for the caches.

    input_ids, position_ids: int64 [T]; query_start: int32 [B+1], first row of each sequence in T;
    seq_lens: int32 [B], tokens of each sequence in the cache after this step;
    slot_mapping: one int64 [T] a group, block * block_size + offset, or -1 for "do not write";
    block_tables: one int32 [B, M] a group; logits_rows: int64 [R]; tree_mask: bool [T, W], whether
    a token sees the j-th token that its own sequence brings in this step; W is 0 where all see
    those before them. rope_lens: int64 [T], the length whose rotary factors a token takes
    (`LengthScaling.lengths`); None where factors do not depend on lengths.

    max_query: no input, but known to the host: most tokens that one sequence brings, or more. It
    decides which package runs the step; 0 where it is not known.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    slot_mapping: list[torch.Tensor]
    block_tables: list[torch.Tensor]
    logits_rows: torch.Tensor
    tree_mask: torch.Tensor
    rope_lens: torch.Tensor | None = None
    max_query: int = 0

    @classmethod
    def named(
        cls, values: Mapping[str, torch.Tensor], spec: CacheSpec, max_query: int | None = None
    ) -> Batch:
        """From tensors by the names of `step_input_names`; max_query None: read from them."""
        groups = range(len(spec.groups))
        if max_query is None:
            max_query = max(values["query_start"].diff().tolist(), default=0)
        return cls(
            input_ids=values["input_ids"],
            position_ids=values["position_ids"],
            query_start=values["query_start"],
            seq_lens=values["seq_lens"],
            slot_mapping=[values[f"slot_mapping_{g}"] for g in groups],
            block_tables=[values[f"block_tables_{g}"] for g in groups],
            logits_rows=values[ROW_INPUT],
            tree_mask=values["tree_mask"],
            rope_lens=values[ROPE_INPUT] if spec.rope is not None else None,
            max_query=max_query,
        )

    def tensors(self) -> list[torch.Tensor]:
        """In the order of `step_input_names`, caches excluded."""
        out = [self.input_ids, self.position_ids, self.query_start, self.seq_lens, self.tree_mask]
        if self.rope_lens is not None:
            out.append(self.rope_lens)
        for slots, table in zip(self.slot_mapping, self.block_tables, strict=True):
            out += [slots, table]
        out.append(self.logits_rows)
        return out

    def check(self, layout: BatchLayout, spec: CacheSpec) -> None:
        """Raise `ContractError` naming the field where this batch leaves the graph's ranges."""
        sizes = {
            "input_ids": (self.input_ids.shape[0], layout.max_tokens),
            "seq_lens": (self.seq_lens.shape[0], layout.max_sequences),
            "logits_rows": (self.logits_rows.shape[0], layout.max_rows),
            "block_tables": (max(t.shape[1] for t in self.block_tables), layout.max_blocks),
        }
        for name, (size, limit) in sizes.items():
            if size > limit:
                raise ContractError(f"{name} has {size} entries, the graph takes at most {limit}")
        if len(self.block_tables) != len(spec.groups) or len(self.slot_mapping) != len(spec.groups):
            raise ContractError(f"block_tables: expected {len(spec.groups)} cache groups")
        if (self.rope_lens is None) != (spec.rope is None):
            asks = "needs" if self.rope_lens is None else "does not take"
            raise ContractError(f"rope_lens: the graph {asks} the lengths of sequences")
        tokens = self.input_ids.shape[0]
        for name, tensor in (
            ("position_ids", self.position_ids),
            *((ROPE_INPUT, r) for r in (self.rope_lens,) if r is not None),
            ("tree_mask", self.tree_mask),
            *(("slot_mapping", s) for s in self.slot_mapping),
        ):
            if tensor.shape[0] != tokens:
                raise ContractError(f"{name} has {tensor.shape[0]} entries for {tokens} tokens")
        if tokens and int(self.position_ids.max()) >= layout.max_position:
            raise ContractError(
                f"position_ids reach {int(self.position_ids.max())}, "
                f"the model's context ends at {layout.max_position}"
            )

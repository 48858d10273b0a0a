"""A tiny two-layer attention model as a step program, and the same model without any cache.

Its logits depend on every earlier token and on positions, so a wrong slot, a stale block or a
wrong length changes them. One layer has a sliding window: two cache groups. Everything is float64
inside, so that how a step is batched cannot change a greedy choice.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import smelt.runtime.ops  # noqa: F401  (registers the operators)
from smelt.runtime.batch import Batch, BatchLayout, CacheGroup, CacheSpec, Features
from smelt.runtime.length_scaling import DYNAMIC, LengthScaling
from smelt.runtime.ops.cache_format import dequantize_rows, quantize_rows


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Import it into a test module: tensors this small only lose by a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


HEADS, KV_HEADS, SIZE = 4, 2, 8
HIDDEN = HEADS * SIZE


class FakeModel:
    """Random weights and the arithmetic both forms share; only `readable` tokens are likely."""

    def __init__(
        self,
        vocab_size: int = 97,
        layers: int = 2,
        seed: int = 0,
        readable: list[int] | None = None,
    ) -> None:
        make = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=make) / shape[0] ** 0.5

        self.vocab_size = vocab_size
        self.embedding = torch.randn(vocab_size, HIDDEN, generator=make)
        self.positions = torch.randn(4096, HIDDEN, generator=make) * 0.5
        self.layers = [
            [weight(HIDDEN, n) for n in (HIDDEN, KV_HEADS * SIZE, KV_HEADS * SIZE, HIDDEN)]
            for _ in range(layers)
        ]
        self.head = weight(HIDDEN, vocab_size) * 4
        self.bias = torch.zeros(vocab_size)
        if readable is not None:
            self.bias.fill_(-100.0)[readable] = 0.0

    def embed(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        rope: LengthScaling | None = None,
        lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Positions mean something else where `rope` says so of a token's length."""
        if rope is not None and lengths is not None:
            other = positions + 1024
            if rope.kind == DYNAMIC:
                other = (1024 + 3 * positions + 7 * lengths) % len(self.positions)
            positions = torch.where(lengths > rope.limit, other, positions)
        return self.embedding[ids] + self.positions[positions]

    def heads(self, x: torch.Tensor, layer: int) -> tuple[torch.Tensor, ...]:
        wq, wk, wv, _ = self.layers[layer]
        x = torch.nn.functional.normalize(x, dim=-1) * HIDDEN**0.5
        q = rowwise(x, wq).view(-1, HEADS, SIZE)
        return q, rowwise(x, wk).view(-1, KV_HEADS, SIZE), rowwise(x, wv).view(-1, KV_HEADS, SIZE)

    def output(self, x: torch.Tensor, attended: torch.Tensor, layer: int) -> torch.Tensor:
        return x + rowwise(attended.reshape(-1, HIDDEN), self.layers[layer][3])

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return rowwise(x, self.head) + self.bias


def rowwise(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight, each row computed alike whatever other rows there are."""
    return (x.double() @ weight.double()).float()


class FakeStep:
    """`StepProgram` over `FakeModel`: layer i sees windows[i] tokens (0: all).

    format: of the cache; the oracle rounds what the cache would. rope: what a position means
    depends on the length of the sequence. features: "final" or "eagle3", what `run_with_features`
    gives: the rows before the head, or the embedded tokens and what the first and the last layer
    give.
    """

    def __init__(
        self,
        model: FakeModel | None = None,
        windows: tuple[int, ...] = (0, 7),
        block_size: int = 4,
        max_tokens: int = 16,
        max_sequences: int = 8,
        max_position: int = 128,
        max_rows: int = 8,
        format: str = "auto",
        rope: LengthScaling | None = None,
        features: str | None = None,
    ) -> None:
        self.model = model or FakeModel(layers=len(windows))
        self.windows = windows
        self.vocab_size = self.model.vocab_size
        self.device = torch.device("cpu")
        kinds = sorted(set(windows))
        groups = tuple(
            CacheGroup(f"w{w}", w, tuple(i for i, x in enumerate(windows) if x == w)) for w in kinds
        )
        layers = len(windows)
        dtype = "float32" if format == "auto" else "uint8"
        self.spec = CacheSpec(
            block_size, dtype, (KV_HEADS,) * layers, (SIZE,) * layers, groups, format, rope
        )
        self.group_of = [kinds.index(w) for w in windows]
        self.layout = BatchLayout(
            max_tokens, max_sequences, -(-max_position // block_size), max_rows, max_position
        )
        self.batches: list[Batch] = []
        self.features = None
        self.weights = {"embed": self.model.embedding, "head": self.model.head.T.contiguous()}
        if features is not None:
            self.features = Features(
                features, HIDDEN * (3 if features == "eagle3" else 1), (), "embed", "head"
            )

    def run(self, batch: Batch, caches: list[torch.Tensor]) -> torch.Tensor:
        return self._run(batch, caches)[0]

    def run_with_features(
        self, batch: Batch, caches: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits, streams = self._run(batch, caches)
        assert self.features is not None
        if self.features.kind == "final":
            return logits, streams[-1][batch.logits_rows]
        return logits, torch.cat([streams[0], streams[1], streams[-1]], -1)

    def _run(
        self, batch: Batch, caches: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits, and the residual streams before and after each layer."""
        batch.check(self.layout, self.spec)
        self.batches.append(batch)
        model = self.model
        x = model.embed(batch.input_ids, batch.position_ids, self.spec.rope, batch.rope_lens)
        streams = [x]
        for layer, window in enumerate(self.windows):
            q, k, v = model.heads(x, layer)
            group = self.group_of[layer]
            args = (
                *(q, k, v, caches[layer], batch.slot_mapping[group]),
                *(batch.query_start, batch.seq_lens, batch.block_tables[group]),
                *(SIZE**-0.5, window, 0.0, None, batch.tree_mask),
            )
            if self.spec.format == "auto":
                attended = torch.ops.smelt.cached_attention(*args)
            else:
                attended = torch.ops.smelt.cached_attention_quantized(*args, self.spec.format)
            x = model.output(x, attended, layer)
            streams.append(x)
        return model.logits(x[batch.logits_rows]), streams

    def oracle(self, tokens: list[int], prompt: int | None = None) -> torch.Tensor:
        """Logits [len, V] of one sequence, computed whole and without a cache.

        prompt: how many tokens are its prompt, where that matters; all of them otherwise.
        """
        ids, positions = torch.tensor(tokens), torch.arange(len(tokens))
        rope, lengths = self.spec.rope, None
        if rope is not None:
            given = len(tokens) if prompt is None else prompt
            lengths = torch.tensor(rope.lengths(len(tokens), given, positions.tolist()))
        x = self.model.embed(ids, positions, rope, lengths)
        for layer, window in enumerate(self.windows):
            q, k, v = self.model.heads(x, layer)
            if self.spec.format != "auto":
                name = self.spec.format
                k, v = (dequantize_rows(quantize_rows(x, name), name, SIZE) for x in (k, v))
            attended = torch.ops.smelt.attention(q, k, v, SIZE**-0.5, window, 0.0, None)
            x = self.model.output(x, attended, layer)
        return self.model.logits(x)

    def greedy(self, tokens: list[int], count: int) -> list[int]:
        """`count` greedy tokens after `tokens`, by the oracle."""
        tokens, prompt = list(tokens), len(tokens)
        for _ in range(count):
            tokens.append(int(self.oracle(tokens, prompt)[-1].argmax()))
        return tokens[-count:]

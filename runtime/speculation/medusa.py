"""Drafts from Medusa heads: small networks that read the model's last hidden row.

Cai et al. 2024 (arXiv:2401.10774). The model's own output layer says which token follows; head i
guesses, from the same row, the token i + 1 places behind that one. Their best few guesses form a
tree, which the next step verifies in one go.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import silu

from ..errors import UserError
from ..sequence import Sequence
from .drafter import Proposal
from .heads import Weights, check_features, model_weight, number, read_config, read_weights

if TYPE_CHECKING:
    from ..engine_options import StepProgram

Choices = tuple[tuple[int, ...], ...]

# Paths of ranks: (1, 0) is head 1's best guess behind head 0's second best. Made by hand after what
# the paper's section 2.3.3 finds: many first guesses, and depth only behind the best ones.
CHOICES: Choices = (
    *((0,), (1,), (2,), (3,), (4,), (5,)),
    *((0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (2, 0), (3, 0)),
    *((0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (1, 0, 0)),
    *((0, 0, 0, 0), (0, 0, 0, 1)),
    (0, 0, 0, 0, 0),
)


class MedusaHeads:
    """n heads of `layers` residual blocks each.

    blocks: [n, K, K] a layer, biases: [n, 1, K] a layer; out: [n, V, K], or [1, V, K] where all
    heads share the model's output layer.
    """

    def __init__(
        self, blocks: list[torch.Tensor], biases: list[torch.Tensor], out: torch.Tensor, count: int
    ) -> None:
        self.blocks, self.biases, self.out, self.count = blocks, biases, out, count

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, B, V] from hidden rows [B, K]."""
        with torch.no_grad():
            x = rows.to(self.out.dtype).expand(self.count, -1, -1)
            for weight, bias in zip(self.blocks, self.biases, strict=True):
                x = x + silu(torch.baddbmm(bias, x, weight.transpose(1, 2)))
            if len(self.out) == 1:  # as one matrix: a batched product copies it for every head
                return torch.nn.functional.linear(x, self.out[0])
            return torch.bmm(x, self.out.transpose(1, 2))


class MedusaDrafter:
    """Proposes a tree of the heads' best guesses. choices: its paths of ranks, parents first.

    The guesses are chosen and not drawn; the verification draws from the model alone, so sampled
    answers stay exact. A sequence has no proposal until the model computed a step of its own.
    """

    name = "medusa"
    features = "final"

    def __init__(self, heads: MedusaHeads, choices: Choices = CHOICES) -> None:
        self.heads = heads
        self.longest = min(heads.count, max(len(path) for path in choices))
        width = heads.out.shape[1]
        wanted = sorted({p for p in choices if max(p) < width}, key=_promise)
        self._trees = [_tree(wanted, levels) for levels in range(self.longest + 1)]
        self._width = 1 + max(max(path) for path in wanted)
        self._rows: dict[Sequence, tuple[int, torch.Tensor]] = {}

    def nodes(self, levels: int) -> int:
        """Tokens of a tree of so many levels."""
        return len(self._trees[min(levels, self.longest)][0])

    def propose(self, sequences: Items[Sequence], counts: Items[int]) -> list[Proposal | None]:
        ready = [i for i, s in enumerate(sequences) if self._fits(s) and counts[i] > 0]
        found: list[Proposal | None] = [None] * len(sequences)
        if not ready:
            return found
        rows = torch.stack([self._rows[sequences[i]][1] for i in ready])
        best = self.heads.logits(rows).topk(self._width).indices.transpose(0, 1).tolist()
        for i, guesses in zip(ready, best, strict=True):
            paths, parents = self._trees[min(counts[i], self.longest)]
            tokens = [guesses[len(path) - 1][path[-1]] for path in paths]
            found[i] = Proposal(tokens, list(parents) if parents else None)
        return found

    def _fits(self, sequence: Sequence) -> bool:
        """Whether the row we have is the one that gave the newest token."""
        row = self._rows.get(sequence)
        return row is not None and row[0] == len(sequence.tokens) - 2

    def observe(self, sequence: Sequence, position: int, features: torch.Tensor) -> None:
        self._rows[sequence] = (position + len(features) - 1, features[-1])

    def drop(self, sequence: Sequence) -> None:
        self._rows.pop(sequence, None)


def _promise(path: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
    """Order of a tree's nodes, parents first. Where a step has too little room for all of them the
    last are cut off, so a chain of first guesses goes before wide levels."""
    return len(path) + 1.5 * sum(path), path


def _tree(choices: list[tuple[int, ...]], levels: int) -> tuple[Choices, tuple[int, ...] | None]:
    """The paths of at most `levels` ranks, and of each the index of the one it goes on from; None
    for a chain, which needs no mask."""
    paths = tuple(path for path in choices if len(path) <= levels)
    at = {path: i for i, path in enumerate(paths)}
    parents = tuple(at[path[:-1]] if len(path) > 1 else -1 for path in paths)
    return paths, None if parents == tuple(range(-1, len(paths) - 1)) else parents


def open_medusa(folder: Path, program: StepProgram) -> MedusaDrafter:
    """The heads of a folder in the layout of the authors' checkpoints.

    config.json has medusa_num_heads, medusa_num_layers and perhaps medusa_choices; the weights are
    in medusa_lm_head.safetensors or .pt, of head i and layer j: `i.j.linear.weight` [K, K],
    `i.j.linear.bias` [K], and `i.LAYERS.weight` [V, K], which is left out of all heads where they
    share the model's output layer. Raises `UserError` for anything else, and for a model of another
    width or vocabulary.
    """
    draft = f"medusa:{folder}"
    width = check_features(program, MedusaDrafter.features, draft)
    config = read_config(folder)
    count = number(config, "medusa_num_heads", folder)
    layers = number(config, "medusa_num_layers", folder, least=0)
    raw = read_weights(folder, "medusa_lm_head.safetensors", "medusa_lm_head.pt")
    named = {name.removeprefix("medusa_head."): value for name, value in raw.items()}
    weights = Weights(named, folder, program.device)
    blocks, biases = [], []
    for layer in range(layers):
        names = [f"{head}.{layer}.linear" for head in range(count)]
        blocks.append(torch.stack([weights.take(f"{n}.weight", width, width) for n in names]))
        biases.append(torch.stack([weights.take(f"{n}.bias", width) for n in names])[:, None])
    own = [f"{head}.{layers}.weight" for head in range(count)]
    size = program.vocab_size
    if any(name in weights for name in own):
        if weights.rows(own[0]) != size:
            raise UserError(
                f"--draft {draft} has another vocabulary: {weights.rows(own[0])} tokens, not {size}"
            )
        out = torch.stack([weights.take(name, size, width) for name in own])
    else:
        out = weights.placed(model_weight(program, "head", draft))[None]
    heads = MedusaHeads(blocks, biases, out, count)
    return MedusaDrafter(heads, _choices(config.get("medusa_choices"), folder))


def _choices(given: Any, folder: Path) -> Choices:
    """The tree of a configuration: a list of paths, every one's beginning among them."""
    if given is None:
        return CHOICES
    wrong = UserError(f"{folder}/config.json: medusa_choices is no list of paths of ranks")
    if not isinstance(given, list) or not given or len(given) > 256:
        raise wrong
    for path in given:
        if not isinstance(path, list) or not path or not all(type(r) is int for r in path):
            raise wrong
    paths = {tuple(path) for path in given}
    if min(min(path) for path in paths) < 0:
        raise wrong
    for path in paths:
        if len(path) > 1 and path[:-1] not in paths:
            raise UserError(f"{folder}/config.json: medusa_choices has {path} without its parent")
    return tuple(paths)

"""insert-kv-cache: one cache tensor a layer, layers of one window share a block table."""

from __future__ import annotations

import pytest
import torch
from helpers.check_pass import check_pass
from helpers.tiny import Toy, after, program_of, tiny_program

from smelt.passes.attention.kv_cache import InsertKvCache
from smelt.passes.attention.logits_rows import KeepLogitsRows
from smelt.passes.base import UserError
from smelt.passes.canonical.remove_noops import RemoveNoops
from smelt.passes.program import Role
from smelt.runtime.batch import CacheGroup

H, G, D = 4, 2, 4


class Attending(Toy):
    """Layers of attention with a window each (0: all tokens)."""

    def __init__(self, windows: tuple[int, ...], softcap: float = 0.0, sinks: bool = False) -> None:
        super().__init__(layers=len(windows))
        self.windows = windows
        self.softcap = softcap
        self.sinks = torch.nn.Parameter(torch.empty(H)) if sinks else None

    def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        for window in self.windows:
            q = x[0].view(-1, H, D)
            k, v = torch.sin(q[:, :G]), torch.cos(q[:, 1 : G + 1])
            out = torch.ops.smelt.attention(q, k, v, D**-0.5, window, self.softcap, self.sinks)
            x = x + out.reshape(1, -1, H * D)
        return x


def test_every_layer_gets_a_cache_of_its_own() -> None:
    found = check_pass(
        Attending((0, 0)),
        InsertKvCache(),
        before={"smelt.attention": 2, "smelt.cached_attention": 0},
        after={"smelt.attention": 0, "smelt.cached_attention": 2},
        matched=2,
        rewritten=2,
        golden="insert-kv-cache_two_layers",
    )
    spec = found.program.caches
    assert spec is not None
    assert (spec.block_size, spec.dtype, spec.heads, spec.head_sizes) == (
        16,
        "float32",
        (G, G),
        (D, D),
    )
    assert spec.groups == (CacheGroup("full", 0, (0, 1)),)
    for cache in found.program.placeholders(Role.CACHE):
        assert len(cache.users) == 1
    assert found.program.dialect.name == "CACHED"


def test_layers_of_one_window_share_a_block_table() -> None:
    found = check_pass(
        Attending((4, 0, 4)),
        InsertKvCache(),
        before={"smelt.attention": 3},
        after={"smelt.cached_attention": 3},
        matched=3,
    )
    assert found.program.caches.groups == (
        CacheGroup("full", 0, (1,)),
        CacheGroup("window_4", 4, (0, 2)),
    )
    tables = [
        node.args[7].name for node in found.program.calls(torch.ops.smelt.cached_attention.default)
    ]
    assert tables == ["block_tables_1", "block_tables_0", "block_tables_1"]


@pytest.mark.parametrize(("softcap", "sinks"), [(7.0, False), (0.0, True)])
def test_softcap_and_sinks_are_handed_on(softcap: float, sinks: bool) -> None:
    found = check_pass(
        Attending((0,), softcap, sinks),
        InsertKvCache(),
        before={"smelt.attention": 1},
        after={"smelt.cached_attention": 1},
    )
    (node,) = found.program.calls(torch.ops.smelt.cached_attention.default)
    assert node.args[10] == softcap
    assert (node.args[11] is not None) == sinks


def test_the_block_size_is_an_option_and_others_are_refused() -> None:
    found = check_pass(
        Attending((0,)), InsertKvCache(), before={}, after={}, options={"block_size": 4}
    )
    assert found.program.caches.block_size == 4
    (cache,) = found.program.placeholders(Role.CACHE)
    assert tuple(cache.meta["val"].shape[1:]) == (2, 4, G, D)
    with pytest.raises(UserError, match="no option 'blocks'; it knows block_size"):
        InsertKvCache.options({"blocks": 3})


def test_in_bfloat16_the_cache_is_bfloat16() -> None:
    subject = program_of(Attending((0,)), dtype=torch.bfloat16)
    found = check_pass(subject, InsertKvCache(), before={}, after={})
    assert found.program.caches.dtype == "bfloat16"


def test_a_model_without_attention_stays_as_it_is() -> None:
    found = check_pass(
        Toy(), InsertKvCache(), before={}, after={"smelt.cached_attention": 0}, matched=0
    )
    assert found.program.caches is None


def test_sizes_of_the_batch_are_symbols_of_their_own() -> None:
    found = check_pass(Attending((0,)), InsertKvCache(), before={}, after={})
    program = found.program
    names = ("input_ids", "query_start", "seq_lens", "block_tables_0", "kv_cache_0")
    sizes = [program.input(name).meta["val"].shape[0] for name in names]
    sizes.append(program.input("block_tables_0").meta["val"].shape[1])
    assert all(isinstance(size, torch.SymInt) for size in sizes)
    assert len({str(size) for size in sizes}) == len(sizes)
    assert program.input("slot_mapping_0").meta["val"].shape[0] == sizes[0]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_families(family: str) -> None:
    subject = after(tiny_program(family), RemoveNoops(), KeepLogitsRows())
    layers = subject.program.facts.hidden_layers
    found = check_pass(
        subject,
        InsertKvCache(),
        before={"smelt.attention": layers},
        after={"smelt.attention": 0, "smelt.cached_attention": layers},
        matched=layers,
    )
    torch.testing.assert_close(found.logits, subject.logits, atol=1e-5, rtol=1e-4)
    windows = {group.window for group in found.program.caches.groups}
    assert windows == ({0} if family == "llama" else {0, 8})

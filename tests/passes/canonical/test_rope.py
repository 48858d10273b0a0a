"""canonicalize-rope: halves, interleaved pairs and partial rotation; nothing that only looks so."""

from __future__ import annotations

import pytest
import torch
from helpers.check_pass import check_pass
from helpers.tiny import Toy, after, program_of, tiny_program

from smelt.passes.canonical.remove_noops import RemoveNoops
from smelt.passes.canonical.rope import CanonicalizeRope

H, D = 2, 8
ONE = {"smelt.rope": 1, "aten.neg": 0}
NONE = {"smelt.rope": 0, "aten.neg": 1}


def halves(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def pairs(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


class Rotary(Toy):
    """One value of [1, H, T, D] rotated; subclasses change one detail."""

    width = D

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", 10.0 ** -torch.arange(self.width // 2))

    def tables(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions[..., None].float() * self.frequencies
        angles = torch.cat((angles, angles), -1)
        return angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        return halves(x)

    def turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return x * cos + self.rotate(x) * sin

    def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        heads = x.view(1, -1, H, D).transpose(1, 2)
        return self.turn(heads, *self.tables(positions)).transpose(1, 2).flatten(-2)


class Interleaved(Rotary):
    def tables(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = (positions[..., None].float() * self.frequencies).repeat_interleave(2, -1)
        return angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        return pairs(x)


class Swapped(Rotary):
    """The sum the other way round."""

    def turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return self.rotate(x) * sin + x * cos


class Partial(Rotary):
    """Only the first features turn."""

    width = 4

    def turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        part, rest = x[..., : self.width], x[..., self.width :]
        return torch.cat((super().turn(part, cos, sin), rest), -1)


class RestFirst(Partial):
    """The unturned features are joined before the others: only the turned part is a match."""

    def turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        part, rest = x[..., : self.width], x[..., self.width :]
        return torch.cat((rest, Rotary.turn(self, part, cos, sin)), -1)


class NoMinus(Rotary):
    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        return torch.cat((x[..., half:], -x[..., :half]), -1)


class PairsStackedAsHalves(Rotary):
    """Odd and even features stacked before the last dimension: neither halves nor pairs."""

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -2).flatten(-2)


class AnotherValue(Rotary):
    """The rotated value is not the one that is multiplied by cos."""

    def turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return x * cos + self.rotate(torch.tanh(x)) * sin


class PerHeadTables(Rotary):
    def tables(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = super().tables(positions)
        return torch.cat((cos, 2 * cos), 1), torch.cat((sin, 3 * sin), 1)


class FiveDimensions(Rotary):
    def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        heads = x.view(1, -1, H, D).transpose(1, 2)[None]
        cos, sin = self.tables(positions)
        return self.turn(heads, cos[None], sin[None])[0].transpose(1, 2).flatten(-2)


@pytest.mark.parametrize(
    ("module", "interleaved"),
    [(Rotary, False), (Swapped, False), (Interleaved, True), (Partial, False)],
)
def test_rotations_become_one_node(module: type[Rotary], interleaved: bool) -> None:
    found = check_pass(module(), CanonicalizeRope(), before=NONE, after=ONE, matched=1, rewritten=1)
    (node,) = found.program.calls(torch.ops.smelt.rope.default)
    assert node.args[3] is interleaved
    assert node.args[0].meta["val"].shape[1:] == (H, D)
    assert node.args[1].meta["val"].shape[-1] == module.width


def test_features_that_do_not_turn_are_covered() -> None:
    check_pass(
        Partial(),
        CanonicalizeRope(),
        before={"aten.cat": 3},
        after={"aten.cat": 1, "aten.slice": 0},
        golden="canonicalize-rope_partial",
    )


def test_features_joined_before_the_turned_ones_stay_outside() -> None:
    check_pass(
        RestFirst(), CanonicalizeRope(), before={"aten.cat": 3}, after={"aten.cat": 2, **ONE}
    )


@pytest.mark.parametrize("module", [NoMinus, PairsStackedAsHalves, AnotherValue])
def test_other_rotations_are_left_alone(module: type[Rotary]) -> None:
    check_pass(module(), CanonicalizeRope(), before=NONE, after=NONE, matched=0)


@pytest.mark.parametrize(
    ("module", "reason"),
    [(PerHeadTables, "differs between heads"), (FiveDimensions, "expected [1, H, T, D]")],
)
def test_near_misses_are_declined_with_a_reason(module: type[Rotary], reason: str) -> None:
    check_pass(
        module(),
        CanonicalizeRope(),
        before=NONE,
        after=NONE,
        matched=1,
        rewritten=0,
        declined=[reason],
    )


def test_tables_are_shared_by_all_layers() -> None:
    class Layers(Rotary):
        def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            heads = x.view(1, -1, H, D).transpose(1, 2)
            cos, sin = self.tables(positions)
            return self.turn(self.turn(heads, cos, sin), cos, sin).transpose(1, 2).flatten(-2)

    found = check_pass(
        Layers(), CanonicalizeRope(), before={"aten.neg": 2}, after={"smelt.rope": 2}, matched=2
    )
    first, second = found.program.calls(torch.ops.smelt.rope.default)
    assert first.args[1] is second.args[1] and first.args[2] is second.args[2]


def test_in_bfloat16_with_float32_tables_the_dtype_stays() -> None:
    class Half(Rotary):
        def turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            return super().turn(x.float(), cos, sin).to(x.dtype)

    module = Half()
    subject = program_of(module, dtype=torch.bfloat16)
    check_pass(subject, CanonicalizeRope(), before=NONE, after=ONE, tolerance=0.05)


@pytest.mark.parametrize(
    ("family", "unturned"), [("llama", 0), ("gpt_neox", 0), ("gpt2", 2), ("cohere2", 1)]
)
def test_queries_and_keys_of_the_layers_that_turn_are_found(family: str, unturned: int) -> None:
    subject = after(tiny_program(family), RemoveNoops())
    turning = subject.program.facts.hidden_layers - unturned
    check_pass(
        subject,
        CanonicalizeRope(),
        before={"smelt.rope": 0},
        after={"smelt.rope": 2 * turning, "aten.neg": 0},
        matched=2 * turning,
    )

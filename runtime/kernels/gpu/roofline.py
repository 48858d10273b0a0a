"""What a kernel cannot be faster than: bytes it must move and operations it must do, and the rates
of cards. A measured time becomes a fraction of that bound."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Of one launch. bytes: read and written in device memory, each byte counted once. operations:
    multiplications and additions of its matrix products. kind: their operands, a key of
    `Card.operations`."""

    bytes: int
    operations: int = 0
    kind: str = "bf16"

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.operations + other.operations, self.kind)


@dataclass(frozen=True)
class Card:
    """bandwidth: bytes a second. operations: dense operations a second by operand kind. sms:
    multiprocessors. shared: bytes of shared memory a block may have."""

    name: str
    capability: int
    bandwidth: float
    operations: dict[str, float]
    sms: int
    shared: int


# From the manufacturer's data sheets and the CUDA programming guide's table of compute
# capabilities; without sparsity.
CARDS = {
    card.name: card
    for card in (
        Card("A100", 80, 2.039e12, {"bf16": 312e12, "int8": 624e12}, 108, 163 << 10),
        Card("RTX 3090", 86, 0.936e12, {"bf16": 71e12, "int8": 284e12}, 82, 99 << 10),
        Card(
            "H100", 90, 3.35e12, {"bf16": 989e12, "int8": 1979e12, "fp8": 1979e12}, 132, 227 << 10
        ),
        Card("H200", 90, 4.8e12, {"bf16": 989e12, "int8": 1979e12, "fp8": 1979e12}, 132, 227 << 10),
        Card(
            "B200", 100, 8.0e12, {"bf16": 2250e12, "int8": 4500e12, "fp8": 4500e12}, 148, 227 << 10
        ),
        Card(
            "RTX 5090",
            120,
            1.792e12,
            {"bf16": 209e12, "int8": 838e12, "fp8": 419e12},
            170,
            99 << 10,
        ),
    )
}


def bound_seconds(cost: Cost, card: Card, bandwidth: float | None = None) -> float:
    """The least time `cost` can take. bandwidth: measured there, in place of the data sheet's."""
    moving = cost.bytes / (bandwidth or card.bandwidth)
    rate = card.operations.get(cost.kind, card.operations["bf16"])
    return max(moving, cost.operations / rate)

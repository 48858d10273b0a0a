"""A few PTX instructions in torch: what a kernel's inline assembly makes of its registers."""

from __future__ import annotations

import torch

FLOATS = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}
MASK = 0xFFFFFFFF


def run(code: str, outputs: int, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Registers $0.. after `code`; inputs: registers of 32 bits as int64 [N], from $outputs on.

    %ctaid.z is 0. Raises NotImplementedError for an instruction that is not here.
    """
    registers = {f"${outputs + i}": x for i, x in enumerate(inputs)}
    zero = torch.zeros_like(inputs[0])

    def value(name: str) -> torch.Tensor:
        if name == "%ctaid.z":
            return zero
        return registers[name] if name in registers else zero + int(name, 0)

    for line in code.strip("{} \n").split(";"):
        words = line.replace(",", " ").split()
        if not words or words[0] == ".reg":
            continue
        operation, target, *sources = words
        registers[target] = _compute(operation, [value(s) for s in sources]) & MASK
    return [registers[f"${i}"] for i in range(outputs)]


def _compute(operation: str, x: list[torch.Tensor]) -> torch.Tensor:
    kind = operation.split(".")[-1]
    match operation.split(".")[0]:
        case "mov":
            return x[0]
        case "or":
            return x[0] | x[1]
        case "and":
            return x[0] & x[1]
        case "xor":
            return x[0] ^ x[1]
        case "shr":
            return x[0] >> x[1]
        case "shl":
            return x[0] << x[1]
        case "lop3":
            return _lookup(x[0], x[1], x[2], int(x[3][0]))
        case "prmt":
            return _permute(x[0] | x[1] << 32, int(x[2][0]))
        case "fma":
            return _halves(kind, lambda a, b, c: a * b + c, x)
        case "add":
            return _halves(kind, lambda a, b: a + b, x)
    raise NotImplementedError(operation)


def _lookup(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, table: int) -> torch.Tensor:
    """Bit by bit, the table's bit of number 4a + 2b + c."""
    out = torch.zeros_like(a)
    for row in range(8):
        if table >> row & 1:
            picks = [v if row >> place & 1 else ~v for v, place in ((a, 2), (b, 1), (c, 0))]
            out |= picks[0] & picks[1] & picks[2]
    return out


def _permute(both: torch.Tensor, selector: int) -> torch.Tensor:
    out = torch.zeros_like(both)
    for i in range(4):
        pick = selector >> 4 * i & 15
        assert pick < 8, "the sign mode is not here"
        out |= (both >> 8 * pick & 255) << 8 * i
    return out


def _halves(kind: str, function: object, x: list[torch.Tensor]) -> torch.Tensor:
    """On two floats a register, exactly and rounded once."""
    assert callable(function)
    out = torch.zeros_like(x[0])
    for shift in (0, 16):
        exact = function(*(as_float(v >> shift & 0xFFFF, FLOATS[kind]) for v in x))
        out |= as_bits(exact.to(FLOATS[kind])) << shift
    return out


def as_float(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """int64 below 2^16 -> float64: the value of the bits as a 16-bit float."""
    return bits.to(torch.int32).to(torch.int16).view(dtype).double()


def as_bits(x: torch.Tensor) -> torch.Tensor:
    """Bits of a 16-bit float, as int64."""
    return x.view(torch.int16).long() & 0xFFFF

"""The quantized weights of a checkpoint, found by their tensors and checked against each other.

Which modules are quantized is decided by the tensors that are there; `quantization_config` says how
to read them. Every shape is checked here, so that what is read later cannot be out of step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch

from smelt.runtime.errors import UserError

from .checkpoint import Checkpoint, TensorEntry
from .quantized import Quantization, WeightForm

# Tensor that marks a quantized linear in each layout, then what belongs to it.
_MARKS = {"awq": "qweight", "gptq": "qweight", "packed": "weight_packed"}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_REST = {
    "awq": {"scales": "scales", "zeros": "qzeros"},
    "gptq": {"scales": "scales", "zeros": "qzeros", "order": "g_idx"},
    "packed": {"scales": "weight_scale", "zeros": "weight_zero_point", "order": "weight_g_idx"},
    "plain": {"scales": "weight_scale", "zeros": "weight_zero_point"},
    "block": {"scales": "weight_scale_inv"},
}
# Tensors of a quantized module that are no weights: shapes, scales of activations, what is unused.
_UNUSED = (
    *("weight_shape", "input_scale", "input_zero_point", "output_scale", "activation_scale"),
    *("weight_observer", "g_idx", "weight_g_idx"),
)


@dataclass(frozen=True)
class StoredWeight:
    """One linear's quantized weight [N, K] in the checkpoint.

    tensors: "q", "scales" and, where there are any, "zeros" and "order" to tensor names. form: with
    group and rows as they really are, never 0; announced: as the configuration has it, 0 for all.
    input_scale: of inputs that are rounded with one scale for all. order: None when feature k
    belongs to group k / group; "groups" when whole groups changed places; "uneven" when groups have
    different sizes; else a digest of the assignment, equal for layers that order their features in
    the same way.
    """

    module: str
    n: int
    k: int
    form: WeightForm
    announced: WeightForm
    tensors: Mapping[str, str]
    order: str | None = None
    input_scale: float | None = None


def stored_weights(
    quantization: Quantization, checkpoint: Checkpoint, where: str
) -> dict[str, StoredWeight]:
    """The quantized linears of a checkpoint, by module path.

    Raises UserError naming the first tensor that is missing or does not fit the others.
    """
    found: dict[str, StoredWeight] = {}
    for name in checkpoint.entries:
        module, _, leaf = name.rpartition(".")
        form = quantization.form(module) if leaf in ("qweight", "weight_packed", "weight") else None
        if form is None:
            _refuse_unannounced(checkpoint, module, leaf, where)
            continue
        if leaf != _MARKS.get(form.layout, "weight"):
            continue
        if leaf == "weight" and checkpoint.entries[name].dtype.itemsize > 1:
            continue  # left at 16 bits, whatever the rules say
        found[module] = _Reader(quantization, checkpoint, module, form, where).read()
    if not found:
        raise UserError(
            f"{where}: config.json announces {quantization.method} weights, and the checkpoint has "
            "no quantized tensor; do the files belong together?"
        )
    return found


def own_tensors(weight: StoredWeight) -> set[str]:
    """Names of all tensors that belong to a quantized linear and are no parameter of the model."""
    return {*weight.tensors.values(), *(f"{weight.module}.{leaf}" for leaf in _UNUSED)}


def _refuse_unannounced(checkpoint: Checkpoint, module: str, leaf: str, where: str) -> None:
    if leaf in ("qweight", "weight_packed"):
        raise UserError(
            f"{where}: {module}.{leaf} is quantized, and quantization_config lists {module} among "
            "the modules left alone; do the files belong together?"
        )


class _Reader:
    """Checks one module's tensors against its form."""

    def __init__(
        self,
        quantization: Quantization,
        checkpoint: Checkpoint,
        module: str,
        form: WeightForm,
        where: str,
    ) -> None:
        self.varies = quantization.varies
        self.checkpoint = checkpoint
        self.module = module
        self.form = form
        self.where = where
        self.tensors = {"q": f"{module}.{_MARKS.get(form.layout, 'weight')}"}
        for role, leaf in _REST[form.layout].items():
            if f"{module}.{leaf}" in checkpoint.entries:
                self.tensors[role] = f"{module}.{leaf}"

    def read(self) -> StoredWeight:
        layout = self.form.layout
        if "scales" not in self.tensors:
            self._missing(_REST[layout]["scales"])
        unpacked = {"awq": self._awq, "gptq": self._gptq, "packed": self._packed}
        n, k = unpacked[layout]() if layout in unpacked else self._plain()
        if layout in ("awq", "gptq") or not self.form.symmetric:
            if "zeros" not in self.tensors:
                self._missing(_REST[layout]["zeros"])
        else:
            self.tensors.pop("zeros", None)
        group, rows = self._groups(n, k)
        order = self._order(k, group)
        if k % group:
            order = "uneven"
        form = WeightForm(**{**vars(self.form), "group": group, "rows": rows})
        scale = self._input_scale()
        return StoredWeight(self.module, n, k, form, self.form, dict(self.tensors), order, scale)

    def _missing(self, leaf: str) -> NoReturn:
        raise UserError(
            f"{self.where}: {self.module} is quantized, and its tensor {self.module}.{leaf} is "
            "missing; is the checkpoint complete?"
        )

    def _wrong(self, role: str, expected: str) -> UserError:
        name = self.tensors[role]
        entry = self.checkpoint.entries[name]
        dtype = str(entry.dtype).removeprefix("torch.")
        return UserError(
            f"{self.where}: {name} is {dtype} {list(entry.shape)}, expected {expected}; "
            "is quantization_config that of this checkpoint?"
        )

    def _entry(self, role: str, dims: int, *dtypes: torch.dtype) -> TensorEntry:
        entry = self.checkpoint.entries[self.tensors[role]]
        if len(entry.shape) != dims or entry.dtype not in dtypes or 0 in entry.shape:
            names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise self._wrong(role, f"{names} in {dims} dimensions")
        return entry

    def _zeros(self, *shape: int) -> None:
        if "zeros" in self.tensors:
            entry = self._entry("zeros", 2, torch.int32)
            if entry.shape != shape:
                raise self._wrong("zeros", f"{list(shape)}")

    def _awq(self) -> tuple[int, int]:
        k, words = self._entry("q", 2, torch.int32).shape
        groups, n = self._entry("scales", 2, *_FLOATS).shape
        if n != 8 * words:
            raise self._wrong("scales", f"[groups, {8 * words}]")
        self._zeros(groups, words)
        return n, k

    def _gptq(self) -> tuple[int, int]:
        words, n = self._entry("q", 2, torch.int32).shape
        groups = self._entry("scales", 2, *_FLOATS).shape[0]
        if self.checkpoint.entries[self.tensors["scales"]].shape[1] != n:
            raise self._wrong("scales", f"[groups, {n}]")
        if self.varies and "order" in self.tensors:
            k = self._entry("order", 1, torch.int32, torch.int64).shape[0]
            bits = 32 * words // k
            if bits not in (4, 8):
                raise self._wrong("q", f"4 or 8 bits for {k} features")
            whole = 0 if groups == 1 else -(-k // groups)
            self.form = WeightForm(**{**vars(self.form), "bits": bits, "group": whole})
        a_word = 32 // self.form.bits
        if n % a_word:
            raise self._wrong("q", f"a number of columns divisible by {a_word}")
        self._zeros(groups, n // a_word)
        return n, words * a_word

    def _packed(self) -> tuple[int, int]:
        n, words = self._entry("q", 2, torch.int32).shape
        a_word = 32 // self.form.bits
        shape = f"{self.module}.weight_shape"
        k = words * a_word
        if shape in self.checkpoint.entries:
            value = self.checkpoint.tensor(shape).flatten().tolist()
            if len(value) != 2 or value[0] != n or not words == -(-value[1] // a_word):
                raise UserError(
                    f"{self.where}: {shape} is {value}, and {self.tensors['q']} has room for "
                    f"[{n}, {k}]; is the checkpoint complete?"
                )
            k = int(value[1])
        if not self.form.symmetric and "zeros" in self.tensors:
            groups = self.checkpoint.entries[self.tensors["scales"]].shape[-1]
            self._zeros(-(-n // a_word), groups)
        return n, k

    def _plain(self) -> tuple[int, int]:
        wanted = torch.int8 if self.form.kind == "int" else torch.float8_e4m3fn
        n, k = self._entry("q", 2, wanted).shape
        if "zeros" in self.tensors and not self.form.symmetric:
            scales = self.checkpoint.entries[self.tensors["scales"]].shape
            zeros = self.checkpoint.entries[self.tensors["zeros"]]
            if zeros.shape != scales or zeros.dtype != torch.int8:
                raise self._wrong("zeros", f"int8 {list(scales)}")
        return n, k

    def _groups(self, n: int, k: int) -> tuple[int, int]:
        """(features, rows) a scale covers, checked against the scales' shape."""
        form = self.form
        group, rows = form.group or k, form.rows or n
        entry = self.checkpoint.entries[self.tensors["scales"]]
        if entry.dtype not in _FLOATS:
            raise self._wrong("scales", "a floating-point tensor")
        shape = tuple(entry.shape)
        across, down = -(-k // group), -(-n // rows)
        expected = (across, n) if form.layout in ("awq", "gptq") else (down, across)
        same = shape == expected
        if form.layout in ("plain", "block") and not same:
            # One scale a tensor or a row may come without its dimensions of size one.
            count = torch.Size(shape).numel()
            same = across == 1 and len(shape) < 2 and count == down
        if not same:
            raise self._wrong("scales", f"{list(expected)} for {k} features in groups of {group}")
        return group, rows

    def _input_scale(self) -> float | None:
        """The scale of inputs that are rounded with one scale for all; None for other inputs."""
        inputs = self.form.inputs
        if inputs is None or inputs.dynamic or inputs.per != "tensor" or not inputs.symmetric:
            return None
        leaf = "activation_scale" if self.form.layout == "block" else "input_scale"
        name = f"{self.module}.{leaf}"
        entry = self.checkpoint.entries.get(name)
        if entry is None:
            self._missing(leaf)
        value = self.checkpoint.tensor(name).flatten()
        if value.numel() != 1 or not 0 < float(value[0]) < float("inf"):
            raise UserError(
                f"{self.where}: {name} is {value.tolist()[:4]}, expected one scale above 0; is the "
                "checkpoint complete?"
            )
        return float(value[0])

    def _order(self, k: int, group: int) -> str | None:
        """What `g_idx` does to the features; the tensor is dropped where it does nothing."""
        if "order" not in self.tensors:
            return None
        entry = self._entry("order", 1, torch.int32, torch.int64)
        if entry.shape != (k,):
            raise self._wrong("order", f"[{k}]")
        index = self.checkpoint.tensor(self.tensors["order"]).to(torch.int64)
        groups = -(-k // group)
        if int(index.min()) < 0 or int(index.max()) >= groups:
            raise UserError(
                f"{self.where}: {self.tensors['order']} names group {int(index.max())} (or one "
                f"below 0), and there are {groups}; is quantization_config that of this checkpoint?"
            )
        if groups == 1 or torch.equal(index, torch.arange(k) // group):
            self.tensors.pop("order")
            return None
        if not bool((index.bincount(minlength=groups) == group).all()):
            return "uneven"
        blocks = index.unflatten(0, (groups, group))
        if bool((blocks == blocks[:, :1]).all()):
            return "groups"
        return hashlib.sha256(index.numpy().tobytes()).hexdigest()[:16]

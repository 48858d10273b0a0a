"""Write an artifact: everything in a scratch folder, the manifest last, then one rename."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from smelt.models.folder import TOKENIZER_FILES
from smelt.passes.program import Program
from smelt.passes.weights import TensorSource
from smelt.runtime import isa
from smelt.runtime.errors import SmeltError, UserError
from smelt.runtime.integrity import describe
from smelt.runtime.manifest import FILE_NAME, Manifest

SHARD_BYTES = 2 << 30
_FULL = 1 << 20


@contextmanager
def replacing(out: Path, force: bool) -> Iterator[Path]:
    """A scratch folder that becomes `out` when the block ends well, and vanishes when it does not.

    Raises UserError when `out` holds something else than an artifact, or an artifact and not
    `force`; a full disk becomes one line.
    """
    _check_free(out, force)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from error
    try:
        yield scratch
        _swap(scratch, out)
    except Exception as error:
        if _is_full(error, out.parent):
            raise SmeltError(
                f"the disk of {out.parent} is full; nothing was kept, free some space and try again"
            ) from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _is_full(error: Exception, folder: Path) -> bool:
    """Whether a full disk is behind `error`: torch and safetensors say so in words of their own."""
    if isinstance(error, UserError):
        return False
    known = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return known or "No space left" in str(error) or shutil.disk_usage(folder).free < _FULL


def _check_free(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out} is a file; name a folder for the artifact")
    if not any(out.iterdir()):
        return
    if not (out / FILE_NAME).is_file():
        raise UserError(f"{out} holds something else than an artifact; name another folder")
    if not force:
        raise UserError(f"{out} already holds an artifact; pass --force to replace it")


def _swap(scratch: Path, out: Path) -> None:
    """Put `scratch` in the place of `out`; at no moment is there half an artifact."""
    scratch.chmod(0o755)
    if not out.exists():
        os.replace(scratch, out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
    os.replace(out, old / "artifact")
    try:
        os.replace(scratch, out)
    except OSError:
        os.replace(old / "artifact", out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_weights(program: Program, source: TensorSource, folder: Path, progress: Any) -> int:
    """Materialise what the graph reads into weights*.safetensors; returns the bytes written.

    The peak is one file's worth of tensors, two gibibytes, and the largest single tensor.
    """
    names = program.used_weights()
    shard: dict[str, torch.Tensor] = {}
    size = total = 0
    files: list[Path] = []

    def flush() -> None:
        nonlocal size
        path = folder / f"weights-{len(files):05d}.safetensors"
        save_file(shard, path)
        files.append(path)
        shard.clear()
        size = 0

    for done, (name, value) in enumerate(program.weights.materialize(names, source)):
        progress("weights", done, len(names))
        if value.is_floating_point() and not _finite(value):
            raise SmeltError(f"weight {name} holds NaN or infinity; is the checkpoint damaged?")
        shard[name] = _own(value)
        size += value.nbytes
        total += value.nbytes
        if size >= SHARD_BYTES:
            flush()
    if shard:
        flush()
    if len(files) == 1:
        os.replace(files[0], folder / "weights.safetensors")
    return total


def _finite(value: torch.Tensor) -> bool:
    """torch.isfinite does not take the eight-bit floats."""
    return bool(torch.isfinite(value.float() if value.itemsize == 1 else value).all())


def _own(value: torch.Tensor) -> torch.Tensor:
    """safetensors refuses views that share storage with another tensor."""
    value = value.contiguous()
    whole = value.untyped_storage().nbytes() == value.nbytes
    return value if whole else value.clone()


def copy_tokenizer(model_folder: Path, folder: Path) -> None:
    """Tokenizer, chat template and generation configuration, as they are."""
    for name in TOKENIZER_FILES:
        if (model_folder / name).is_file():
            shutil.copyfile(model_folder / name, folder / name)


def describe_target(device: str) -> dict[str, Any]:
    """What the compiled part needs of a machine."""
    target: dict[str, Any] = {
        "device": device,
        "machine": isa.machine(),
        "isa": isa.compiled_for(os.environ.get("CXX", "g++")),
        "torch": torch.__version__.split("+")[0],
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        target["capability"] = list(torch.cuda.get_device_capability())
        target["gpu"] = torch.cuda.get_device_name()
    return target


def seal(manifest: Manifest, folder: Path) -> None:
    """Hash every file and write the manifest, the last file of all."""
    manifest.files = {
        str(path.relative_to(folder)): describe(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != FILE_NAME
    }
    manifest.write(folder)

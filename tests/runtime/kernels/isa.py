"""Switching the kernels' instruction set inside one process."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

from smelt.runtime.kernels import build


def _library() -> ctypes.CDLL:
    build.load()
    library = ctypes.CDLL(str(build.library_path()))
    library.smelt_cpu_set_isa.argtypes = [ctypes.c_char_p]
    return library


@contextmanager
def instruction_set(name: str) -> Iterator[bool]:
    """Run the body on the named set; gives False where this machine does not have it."""
    before = build.active_isa()
    library = _library()
    try:
        yield bool(library.smelt_cpu_set_isa(name.encode()))
    finally:
        library.smelt_cpu_set_isa(before.encode())


def available() -> list[str]:
    """Sets of this machine, from the plainest to the best."""
    names = []
    for name in build.ISA_FLAGS:
        with instruction_set(name) as there:
            if there:
                names.append(name)
    return names

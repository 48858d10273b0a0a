"""The `isa` fixture: every test that takes it runs once on each instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from smelt.runtime.kernels import build

from .isa import instruction_set


@pytest.fixture(params=list(build.ISA_FLAGS))
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with instruction_set(request.param) as there:
        if not there:
            pytest.skip(f"this machine has no {request.param}")
        yield request.param


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The sizes here are small: threads would mostly wait for each other. Some tests set more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

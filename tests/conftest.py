"""What every test gets: no network, few threads, and the folder with real models where it is."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

# Before transformers and huggingface_hub are imported: both read these when they load.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before triton is: its kernels run in Python over CPU tensors, unless there is a device.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from helpers.data import data_path

# Tests compute on small tensors, where more threads only wait for each other. The kernel cache
# stays the user's: the C++ kernels are built once and not once a run.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))

# Structured traces for torch's own tools: empty lines by the thousand in a failure's report.
logging.getLogger("torch.__trace").propagate = False


@pytest.fixture
def data() -> Callable[[str], Path]:
    """`data("models/stories260K")`: a path of the real data; the test skips where it is absent."""
    return data_path


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """A test that draws without a generator of its own draws the same numbers every time."""
    torch.manual_seed(0)

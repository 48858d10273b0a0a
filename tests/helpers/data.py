"""Where the real vocabularies, models and texts for tests are; tests skip where they are absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("SMELT_DATA") or ROOT.parent / "shared" / "data")


def data_path(name: str) -> Path:
    """A file or folder of the data, or skip the test naming what is missing."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is absent: set SMELT_DATA to the folder with the test data")
    return path

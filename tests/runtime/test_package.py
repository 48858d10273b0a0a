"""The private interfaces of torch that runtime/package.py uses are still there.

How a package behaves is tested where one is compiled: tests/compiler/test_lower.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from smelt.runtime.package import Package, PackageError

LOADER = ("get_constant_fqns", "load_constants", "boxed_run")


def test_the_loader_class_is_there() -> None:
    loader = torch._C._aoti.AOTIModelPackageLoader
    for method in LOADER:
        assert callable(getattr(loader, method)), method


def test_the_loader_takes_the_arguments_we_give() -> None:
    text = torch._C._aoti.AOTIModelPackageLoader.__init__.__doc__ or ""
    assert text.count("arg") >= 5 or "model_package_path" in text, text
    constants = torch._C._aoti.AOTIModelPackageLoader.load_constants.__doc__ or ""
    assert constants.count("bool") >= 3, constants


@pytest.mark.parametrize("content", [None, b"", b"not a zip file"])
def test_a_package_that_does_not_load_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "step.pt2"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(
        PackageError, match=r"step.pt2 does not load: .*compile the model again"
    ) as e:
        Package(path, {})
    assert "\n" not in str(e.value)

"""Open and run an AOTInductor package; the one runtime file that uses private torch interfaces.

`torch._inductor.aoti_load_package` takes 2.3 s because it imports Inductor; the loader class it
wraps takes 6 ms. tests/runtime/test_package.py pins each symbol used here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from .errors import SmeltError


class PackageError(SmeltError):
    """A compiled package cannot be opened or run on this machine."""


class Package:
    """A compiled step with its weights bound.

    weights: by constant name, kept alive here and used in place (no copy is made, so one mapping
    of the file serves every specialisation). single_threaded: leave out what lets several threads
    run it at once; on CUDA that asks the device whether earlier runs are done, which a graph that
    is being captured cannot.
    """

    def __init__(
        self, path: Path, weights: Mapping[str, torch.Tensor], single_threaded: bool = False
    ) -> None:
        try:
            self._loader = torch._C._aoti.AOTIModelPackageLoader(
                str(path), "model", single_threaded, 1, -1
            )
        except RuntimeError as error:
            line = str(error).strip().split("\n")[0]
            raise PackageError(
                f"{path.name} does not load: {line}; compile the model again"
            ) from error
        wanted = self._loader.get_constant_fqns()
        missing = [name for name in wanted if name not in weights]
        if missing:
            raise PackageError(f"{path.name} wants weight {missing[0]}, which the artifact lacks")
        self._weights = {name: weights[name] for name in wanted}
        self._loader.load_constants(self._weights, False, True, True)

    def run(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        """One step's logits. `inputs` is emptied: the loader takes ownership of the references."""
        return self.outputs(inputs)[0]

    def outputs(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """All that one step gives: logits, and features where it was compiled with them."""
        found: list[torch.Tensor] = self._loader.boxed_run(inputs)
        return found

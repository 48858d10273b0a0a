"""`python fake_cli.py FOLDER TEMPLATE VERB ...`: the command line with a fake artifact in FOLDER.

TEMPLATE is "template" or "none". SLOW=1 in the environment makes each step take 20 ms.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    import torch
    from helpers.fake_artifact import TEMPLATE, fake_artifact

    torch.set_num_threads(1)
    folder, kind, *arguments = sys.argv[1:]
    artifact = fake_artifact(Path(folder), TEMPLATE if kind == "template" else None)
    if os.environ.get("SLOW"):
        run = artifact.program.run

        def slow(*inputs: Any) -> Any:
            time.sleep(0.02)
            return run(*inputs)

        artifact.program.run = slow  # type: ignore[method-assign]
    module: Any = SimpleNamespace(open_artifact=lambda path: artifact)
    sys.modules["smelt.runtime.artifact"] = module
    from smelt.cli.app import main as smelt_main

    smelt_main(arguments)


if __name__ == "__main__":
    main()

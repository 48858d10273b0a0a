"""The graph passes, one idea a file, and the program they transform."""

if not __name__.startswith("smelt."):
    raise ImportError(
        "import this package as smelt.passes: a second copy would register the operators twice"
    )

import smelt.runtime.ops  # noqa: F401 - patterns name the operators, so they exist first

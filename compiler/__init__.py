"""From a checkpoint to an artifact: load, trace, passes, lower, write."""

if not __name__.startswith("smelt."):
    raise ImportError(
        "import this package as smelt.compiler: a second copy would register the operators twice"
    )

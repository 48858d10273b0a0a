"""The command line: one file a verb, each a thin call into the packages."""

if not __name__.startswith("smelt."):
    raise ImportError(
        "import this package as smelt.cli: a second copy would register the operators twice"
    )

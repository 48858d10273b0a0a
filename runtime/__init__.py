"""What runs an artifact: engine, paged cache, sampler, operators. Imports none of the others."""

if not __name__.startswith("smelt."):
    raise ImportError(
        "import this package as smelt.runtime: a second copy would register the operators twice"
    )

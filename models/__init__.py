"""Checkpoints in and out: Hugging Face folders, their configurations and weights."""

if not __name__.startswith("smelt."):
    raise ImportError(
        "import this package as smelt.models: a second copy would register the operators twice"
    )

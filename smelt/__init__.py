"""smelt: compiles a Hugging Face causal LM into a fast artifact, and runs it."""

__version__ = "0.1.0"

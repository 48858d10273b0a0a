"""The smelt:: operators. Importing this package registers all of them, with their references."""

from . import (  # noqa: F401
    attention,
    experts,
    experts_quantized,
    gated_activation,
    linear,
    linear_fp8,
    linear_w8a8,
    norm,
    rope,
    sequence_length,
)
from .attention import attention as attention_reference
from .attention import cached_attention as cached_attention_reference

__all__ = ["attention_reference", "cached_attention_reference"]

"""The smelt:: operators. Importing this package registers all of them, with their references."""

from . import attention, experts, gated_activation, linear, norm, rope  # noqa: F401
from .attention import attention as attention_reference
from .attention import cached_attention as cached_attention_reference

__all__ = ["attention_reference", "cached_attention_reference"]

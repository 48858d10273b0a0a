"""Passes around attention: the paged cache, and the rows whose logits are wanted."""

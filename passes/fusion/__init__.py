"""Passes that merge neighbouring operators."""

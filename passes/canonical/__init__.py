"""Passes that bring a traced graph into the semantic form: one node an idea."""

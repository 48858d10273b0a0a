"""Drafting ahead: somebody cheap proposes tokens, one step of the model verifies them all.

`drafter` says what a proposer gives, `control` how many tokens to ask for, `verify` what is taken.
Proposers: `ngram` (the text so far), `model` (a smaller artifact), `medusa` and `eagle3` (heads
trained on the model's own hidden rows; `heads` reads their folders).
"""

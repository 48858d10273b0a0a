"""The two kinds of error a person sees; each says what was found, where, and what to do next."""

from __future__ import annotations


class SmeltError(Exception):
    """Something failed that is not the user's mistake; the command exits with 1."""

    exit_code = 1


class UserError(SmeltError):
    """The user's input cannot be used as it is; the command exits with 2."""

    exit_code = 2

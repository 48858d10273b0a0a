"""The two kinds of error a person sees; each says what was found, where, and what to do next."""

from __future__ import annotations


class SmeltError(Exception):
    """Something failed that is not the user's mistake; the command exits with 1."""

    exit_code = 1


class UserError(SmeltError):
    """The user's input cannot be used as it is; the command exits with 2."""

    exit_code = 2


class TargetMismatch(SmeltError):
    """The compiled part of an artifact was made for another machine, device or torch version.

    `smelt.load` and the command line then rebuild it from the portable program.
    """

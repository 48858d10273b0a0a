"""`smelt VERB ...`: finds the verb's file, runs it, and turns errors into one line each.

A verb is imported only when it is called, so that `smelt generate` pays neither for the compiler
nor for other verbs, and `smelt --help` for none. Exit codes: 0, 1 for a failure, 2 for the
user's mistake, 130 for Ctrl-C.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from smelt import __version__
from smelt.runtime.errors import SmeltError

# verb -> its module in smelt.cli (which has a function `command`), and the line `--help` shows.
VERBS = {
    "compile": ("compile", "Compile a Hugging Face model into an artifact."),
    "generate": ("generate", "Continue prompts with an artifact."),
    "chat": ("chat", "Talk with an artifact."),
    "inspect": ("inspect", "What an artifact is, what made it, what each pass did."),
    "passes": ("passes", "The resolved pass pipeline, or one pass's page."),
    "trace": ("trace", "Whether a model class exports and matches eager, quickly."),
    "export": ("export", "Write an artifact's weights as a Hugging Face folder."),
    "plan": ("plan", "Memory a model will need, before anything is built."),
    "eval": ("eval", "Perplexity, distance from the original, needles, tasks."),
    "bench": ("bench", "Speed of an artifact against this machine's bandwidth."),
    "tune": ("tune", "Time tile sizes of GPU kernels, compile with the best."),
    "doctor": ("doctor", "What this machine has and what smelt can do on it."),
}


# Loggers of packages that transformers imports wherever they are installed; what they warn about
# (kernels for other devices, deprecations among themselves) is nothing a user of smelt can act on.
CHATTY = ("torchao", "torch.utils._pytree")

# The base of all "wrong command line" errors; where it lives differs between versions of Typer.
_UsageError: Any = typer.BadParameter.__mro__[1]


class Verbs(TyperGroup):
    """All verbs by name and help line; the one that is called is imported."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for verb, (_, line) in VERBS.items():
            self.commands.setdefault(verb, TyperCommand(verb, help=line))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The verb's own command in place of the entry that only had its help line."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, _load(name) if name in VERBS else command, rest

    def invoke(self, ctx: Any) -> Any:
        """Run the verb. Ctrl-C leaves from here, or the framework would make an Abort of it."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            if ctx.params.get("debug"):
                raise
            raise SystemExit(report(error)) from error


def report(error: BaseException) -> int:
    """Print one line about an error to stderr; returns the exit code."""
    if isinstance(error, KeyboardInterrupt):
        line, code = "interrupted", 130
    elif isinstance(error, _UsageError):
        path = error.ctx.command_path if error.ctx else "smelt"
        message = error.format_message().rstrip(".")
        line, code = f"{message}; {path} --help lists what there is", 2
    elif isinstance(error, SmeltError):
        line, code = str(error), error.exit_code
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" ({error.filename})" if error.filename else ""
        line, code = f"the disk is full{where}: free some space and run it again", 1
    elif isinstance(error, OSError):
        line, code = f"{error.strerror or error}: {error.filename or 'unnamed file'}", 1
    elif isinstance(error, MemoryError):
        line, code = "out of memory: close something, or take a smaller model or cache", 1
    else:
        text = " ".join(str(error).split()) or "no message"
        line, code = f"{type(error).__name__}: {text} (--debug shows where)", 1
    sys.stdout.flush()
    print("smelt:", " ".join(line.splitlines()), file=sys.stderr)
    return code


def _load(verb: str) -> Any:
    """The Typer command of a verb; its module is `smelt.cli.<name>`."""
    module_name = f"smelt.cli.{VERBS[verb][0]}"
    if find_spec(module_name) is None:
        raise SmeltError(f"smelt {verb} is not part of this installation: install all of smelt")
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(verb)(import_module(module_name).command)
    return typer.main.get_command(single)


app = typer.Typer(
    cls=Verbs,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Compiles a Hugging Face causal LM into a fast artifact, and runs it.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"smelt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (also after a verb).")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Compiles a Hugging Face causal LM into a fast artifact, and runs it."""


def quiet_libraries() -> None:
    """Let CHATTY libraries speak of errors only."""
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)


def _debug_first(arguments: list[str]) -> list[str]:
    """`--debug` belongs to `smelt`, but people add it behind the command that just failed."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    before = [argument for argument in arguments[:end] if argument != "--debug"]
    return ["--debug"] * (len(before) < end) + before + arguments[end:]


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `smelt` command; leaves by SystemExit."""
    arguments = _debug_first(sys.argv[1:] if arguments is None else arguments)
    debug = arguments[:1] == ["--debug"]
    if not debug:
        quiet_libraries()
    try:
        code = app(args=arguments or ["--help"], prog_name="smelt", standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        code = report(KeyboardInterrupt())
    except BrokenPipeError:
        # Whoever read our output has gone; stdout must not be flushed again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        if debug and not isinstance(error, _UsageError):
            raise
        code = report(error)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()

"""Failures as users see them: one line, a remedy, an exit code."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer

from p2pfast.errors import UsageError, first_line

P = ParamSpec("P")
R = TypeVar("R")

BAD_INPUTS = 1
USAGE = 2
INTERNAL = 70  # EX_SOFTWARE of sysexits.h
INTERRUPTED = 130  # 128 + SIGINT, what shells report


def reported(command: Callable[P, R]) -> Callable[P, R]:
    """Turn what a command raises into a message and an exit code; P2PFAST_TRACEBACK=1 keeps tracebacks."""

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except UsageError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(USAGE) from error
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader has gone, as in `p2pfast info | head`
            raise typer.Exit(0) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if os.environ.get("P2PFAST_TRACEBACK") == "1":
                raise
            typer.echo(
                f"internal error: {type(error).__name__}: {first_line(error)}\n"
                "This is a bug in p2pfast; please report it with the output of the same command under "
                "P2PFAST_TRACEBACK=1.",
                err=True,
            )
            raise typer.Exit(INTERNAL) from error

    return wrapper

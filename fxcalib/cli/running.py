"""What commands have in common while they run: progress, warnings, errors to exit codes, JSON."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer

from fxcalib.errors import FxcalibError

if TYPE_CHECKING:
    from fxcalib.display import RichProgress

UNTRACEABLE = 1
BAD_INPUT = 2
INTERRUPTED = 130


@contextlib.contextmanager
def reported(*, debug: bool, quiet: bool, as_json: bool) -> Iterator[RichProgress]:
    """Draw progress while the body runs; turn its errors into one message and an exit code."""
    from fxcalib.display import RichProgress, stderr_console

    progress = RichProgress(quiet=quiet)
    # with --json, nothing that a library prints may come before the one line
    stdout = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()

    def warn(message: Warning | str, *where: Any, **more: Any) -> None:
        if not quiet:
            stderr_console().print(f"warning: {message}", style="yellow", markup=False, highlight=False)

    try:
        with stdout, warnings.catch_warnings():
            warnings.showwarning = warn
            yield progress
    except KeyboardInterrupt:
        progress.close()
        stderr_console().print("interrupted: nothing was saved", style="red")
        raise typer.Exit(INTERRUPTED) from None
    except FxcalibError as error:
        progress.close()
        if debug:
            raise
        stderr_console().print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(BAD_INPUT) from None
    finally:
        progress.close()


def print_json(values: dict[str, Any]) -> None:
    from fxcalib.report import plain

    typer.echo(json.dumps(plain(values), allow_nan=False))

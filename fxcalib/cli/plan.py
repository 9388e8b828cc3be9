"""`fxcalib plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxcalib.cli import options as o
from fxcalib.cli.run_options import RunOptions
from fxcalib.cli.running import print_json, reported

EPILOG = (
    "[bold]Examples[/bold]\n\n"
    "fxcalib plan meta-llama/Llama-3.1-70B --samples 512 --seq-len 2048\n\n"
    "fxcalib plan ./my-model --scheme FP8 --algorithm rtn --calibrate-machine"
)
_UNREAD = ("data", "text_column", "completion_only", "streaming")
"""Options of data, which is not read."""


def plan(
    run: RunOptions,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A model folder or a Hugging Face id; only its config is read."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="Folder to be checked.", rich_help_panel=o.OUTPUT),
    ] = None,
    evaluate: Annotated[
        bool, typer.Option("--eval", help="Taken, but evaluation is not planned.", rich_help_panel=o.OUTPUT)
    ] = False,
    calibrate_machine: Annotated[
        bool,
        typer.Option(
            "--calibrate-machine",
            help="Measure first how fast this machine multiplies and copies, to estimate times from now on.",
            rich_help_panel=o.HOW,
        ),
    ] = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Show what quantize would do with the same options, and the memory it would take, without weights and data."""
    with reported(debug=debug, quiet=quiet, as_json=as_json):
        given = {name: value for name, value in run.given().items() if name not in _UNREAD}
        from fxcalib import api

        found = api.plan(model, output=output, calibrate_machine=calibrate_machine, **given)
    if as_json:
        print_json(found.to_dict())
    else:
        typer.echo(str(found))

"""The command line: options to keyword arguments, errors to exit codes. Heavy imports wait until they are needed."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from fxcalib.cli import evaluate, graph, plan, quantize, trace
from fxcalib.cli.running import BAD_INPUT, INTERRUPTED, UNTRACEABLE
from fxcalib.cli.words import flat, gathered
from fxcalib.errors import OptionError

__all__ = ["BAD_INPUT", "INTERRUPTED", "UNTRACEABLE", "app", "main"]

app = typer.Typer(
    name="fxcalib",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Quantize and prune PyTorch language models after training: INT4, INT8 and FP8 checkpoints for transformers "
    "and vLLM.",
    epilog="Begin with [bold]fxcalib quantize[/bold]: it needs no model and no data, and shows what calibration gains.",
)


def main() -> None:
    """Entry point of `fxcalib` and `python -m fxcalib`."""
    try:
        arguments = gathered(sys.argv[1:])
    except OptionError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(BAD_INPUT) from None
    app(args=arguments)


def _version(asked: bool) -> None:
    if asked:
        from fxcalib.report import versions

        found = versions()
        others = ", ".join(f"{name} {version}" for name, version in found.items() if name != "fxcalib")
        typer.echo(f"fxcalib {found['fxcalib']} ({others})")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the versions and exit.")
    ] = False,
) -> None:
    pass


app.command(epilog=quantize.EPILOG)(flat(quantize.quantize))
app.command(name="eval", epilog=evaluate.EPILOG)(evaluate.evaluate)
app.command(epilog=graph.EPILOG)(graph.graph)
app.command(name="trace", help=trace.HELP, epilog=trace.EPILOG)(trace.trace)
app.command(epilog=plan.EPILOG)(flat(plan.plan))

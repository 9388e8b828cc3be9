"""`fxcalib trace`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fxcalib.cli import options as o
from fxcalib.cli.running import UNTRACEABLE, print_json, reported
from fxcalib.cli.words import names

HELP = (
    "Trace a model and list what is found and assumed, or explain why it cannot be traced; only its config is "
    "loaded.\n\n"
    "A traced model is cut at its targets (the decoder layers) into subgraphs that calibration runs one after another. "
    "A guard is what the trace assumes of a batch, with the line of the model that assumes it: a batch that breaks one "
    "is traced anew. Where a model cannot be traced, its line, the calls that lead there, the values on it and code "
    "that helps are printed."
)
EPILOG = (
    "[bold]Examples[/bold]\n\n"
    "fxcalib trace HuggingFaceTB/SmolLM2-135M-Instruct\n\n"
    "fxcalib trace ./my-model --verify\n\n"
    "fxcalib trace ./my-model --batch batch.pt --targets Linear --json\n\n"
    "[bold]Exit codes[/bold]\n\n"
    "0: traced, and exact where --verify asked. 1: cannot be traced, which is explained, or not exact. "
    "2: model, batch or options are wrong."
)


def trace(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or a Hugging Face id.")],
    targets: o.Targets = None,
    targets_per_subgraph: o.TargetsPerSubgraph = 1,
    batch: o.BatchFile = None,
    seq_len: o.SequenceLength = None,
    batch_size: o.BatchSize = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Load the weights as well, run the model and its subgraphs on the batch and on one of other sizes, "
            "and compare what they return bit for bit.",
            rich_help_panel=o.HOW,
        ),
    ] = False,
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Trace a model and list what is found and assumed, or explain why it cannot be traced."""
    options: dict[str, Any] = {
        "targets": names(targets),
        "targets_per_subgraph": targets_per_subgraph,
        "batch_file": batch,
        "seq_len": seq_len,
        "batch_size": batch_size,
        "check": verify,
        "trust_remote_code": trust_remote_code,
    }
    given = {name: value for name, value in options.items() if value is not None}
    with reported(debug=debug, quiet=quiet, as_json=as_json):
        from fxcalib.trace_report import TraceReport, trace_command

        found = trace_command(model, **given)
    exact = isinstance(found, TraceReport) and found.exact
    if as_json:
        print_json(found.to_dict())
    elif isinstance(found, TraceReport):
        typer.echo(str(found))
    else:
        typer.echo(f"error: {found}", err=True)
    if not exact:
        raise typer.Exit(UNTRACEABLE)

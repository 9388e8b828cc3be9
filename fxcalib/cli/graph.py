"""`fxcalib graph`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fxcalib.cli import options as o
from fxcalib.cli.running import UNTRACEABLE, reported
from fxcalib.cli.words import names

EPILOG = (
    "[bold]Examples[/bold]\n\n"
    "fxcalib graph HuggingFaceTB/SmolLM2-135M-Instruct -o graph.svg\n\n"
    "fxcalib graph ./my-model -o graph.html --report my-model-W4A16/fxcalib_report.json\n\n"
    "fxcalib graph ./my-model -o graph.dot --targets Linear --expand"
)


def graph(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or a Hugging Face id.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The picture; its ending says which kind: .svg .png .pdf .dot .json or .html (pan, zoom and search).",
            rich_help_panel=o.OUTPUT,
        ),
    ],
    expand: Annotated[
        bool,
        typer.Option("--expand", help="Draw repeated subgraphs one by one.", rich_help_panel=o.OUTPUT),
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="fxcalib_report.json of a run: its errors and times are shown with the graph.",
            rich_help_panel=o.OUTPUT,
        ),
    ] = None,
    targets: o.Targets = None,
    targets_per_subgraph: o.TargetsPerSubgraph = 1,
    batch: o.BatchFile = None,
    samples: o.Samples = None,
    seq_len: o.SequenceLength = None,
    batch_size: o.BatchSize = None,
    trust_remote_code: o.TrustRemoteCode = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Draw the graph of a model, cut into the subgraphs that calibration runs; only its config is loaded."""
    options: dict[str, Any] = {
        "report": report,
        "targets": names(targets),
        "targets_per_subgraph": targets_per_subgraph,
        "batch_file": batch,
        "samples": samples,
        "seq_len": seq_len,
        "batch_size": batch_size,
        "expand": expand,
        "trust_remote_code": trust_remote_code,
    }
    given = {name: value for name, value in options.items() if value is not None}
    with reported(debug=debug, quiet=quiet, as_json=False):
        from fxcalib.viz.command import draw

        failure = draw(model, output, **given)
    if failure is not None:
        typer.echo(f"error: {failure}\nThe module tree is in {output}", err=True)
        raise typer.Exit(UNTRACEABLE)
    typer.echo(f"The graph is in {output}")

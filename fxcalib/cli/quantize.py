"""`fxcalib quantize`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from fxcalib.cli import options as o
from fxcalib.cli.run_options import RunOptions
from fxcalib.cli.running import print_json, reported
from fxcalib.errors import OptionError

EPILOG = (
    "[bold]Examples[/bold]\n\n"
    "fxcalib quantize\n\n"
    "fxcalib quantize HuggingFaceTB/SmolLM2-135M-Instruct --group-size 64 --eval\n\n"
    "fxcalib quantize ./my-model --scheme FP8_DYNAMIC --algorithm rtn -o my-model-fp8\n\n"
    "fxcalib quantize ./my-model --scheme W8A8 --smoothquant 0.8 --data chats.jsonl --completion-only\n\n"
    "fxcalib quantize ./my-model --algorithm sparsegpt --mask-structure 2:4\n\n"
    "fxcalib quantize ./my-model --recipe recipe.yaml --samples 512 --seq-len 2048"
)


def quantize(
    run: RunOptions,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A model folder or a Hugging Face id. Without it, a small model that fxcalib ships is quantized with "
            "and without calibration and the results are compared.",
        ),
    ] = None,
    batches: o.Batches = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="Folder of the checkpoint. Default: MODEL-SCHEME in the current folder.",
            rich_help_panel=o.OUTPUT,
        ),
    ] = None,
    evaluate: Annotated[
        bool,
        typer.Option("--eval", help="Measure perplexity on held-out text before and after.", rich_help_panel=o.OUTPUT),
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Print where the time went.", rich_help_panel=o.OUTPUT)
    ] = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Quantize or prune a model and save it as a compressed-tensors checkpoint."""
    with reported(debug=debug, quiet=quiet, as_json=as_json) as progress:
        given = {**run.given(), "profile": profile}
        if batches is not None:
            if run.data is not None:
                raise OptionError("--data and --batches are given; give one of them")
            from fxcalib.data import load_batches

            given["data"] = load_batches(batches)
        if model is None:
            from fxcalib import demo

            if output is None:  # what an earlier try left in its default place is only that
                output, given["overwrite"] = run.default_output(demo.NAME), True
            comparison = demo.compare(output=output, progress=progress, **given)
            report, table = comparison.report, comparison.table()
        else:
            from fxcalib import api

            target = run.default_output(model) if output is None else output
            report, table = api.quantize(model, output=target, evaluate=evaluate, progress=progress, **given), None
    if as_json:
        print_json(report.summary())
    elif table is not None:
        from rich.console import Console

        Console().print(table)
        typer.echo("".join(f"{line}\n" for line in report.profile_table()), nl=False)
        typer.echo(f"The checkpoint is in {report.output}")
    else:
        typer.echo(str(dataclasses.replace(report, warnings=())))  # they were printed when they arose

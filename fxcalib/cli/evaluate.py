"""`fxcalib eval`."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from fxcalib.cli import options as o
from fxcalib.cli.running import print_json, reported

EPILOG = (
    "[bold]Examples[/bold]\n\n"
    "fxcalib eval SmolLM2-135M-Instruct-W4A16\n\n"
    "fxcalib eval SmolLM2-135M-Instruct-W4A16 --reference HuggingFaceTB/SmolLM2-135M-Instruct --data wiki.jsonl"
)


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="DIR", help="A model folder, quantized or not, or a Hugging Face id.")
    ],
    reference: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Measure the KL divergence to this model, usually the original."),
    ] = None,
    data: o.Data = None,
    text_column: o.TextColumn = None,
    samples: o.Samples = None,
    seq_len: o.SequenceLength = None,
    batch_size: o.BatchSize = None,
    seed: o.Seed = 0,
    device: o.Device = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Measure perplexity, and the mean KL divergence in nats per token to a reference model."""
    options: dict[str, Any] = {
        "data": data,
        "text_column": text_column,
        "samples": samples,
        "seq_len": seq_len,
        "batch_size": batch_size,
        "seed": seed,
        "device": device,
    }
    given = {name: value for name, value in options.items() if value is not None}
    with reported(debug=debug, quiet=quiet, as_json=as_json) as progress:
        from fxcalib.evaluation import evaluate

        result = evaluate(model, reference, progress=progress, **given)
    if as_json:
        print_json(dataclasses.asdict(result))
    else:
        typer.echo(str(result))

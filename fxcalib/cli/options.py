"""What each option of the command line is called, takes and means; the commands choose among them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

WHAT, DATA, HOW, OUTPUT = "What to do", "Data", "How it runs", "Output"
"""Panels of the help."""

_SCHEMES = "W4A16, W4A16_ASYM, W8A16, W8A8, FP8, FP8_DYNAMIC, ... (the presets of compressed-tensors). Default: W4A16."


def _size_or_auto(text: str) -> int | None:
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a number of samples nor auto") from None


Algorithm = Annotated[
    str | None,
    typer.Option(
        "--algorithm",
        "-a",
        metavar="A",
        help="[cyan]gptq[/cyan] rounds each weight in view of the errors so far, [cyan]awq[/cyan] scales the weights "
        "that matter first, [cyan]rtn[/cyan] rounds to nearest. [cyan]sparsegpt[/cyan], [cyan]wanda[/cyan] and "
        "[cyan]magnitude[/cyan] set weights to zero instead. Default: gptq.",
        rich_help_panel=WHAT,
    ),
]
Scheme = Annotated[
    str | None,
    typer.Option("--scheme", "-s", metavar="S", help=_SCHEMES, rich_help_panel=WHAT),
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Weights that share a scale, along the inputs. Smaller is more exact and larger on disk. "
        "Default: the scheme's.",
        rich_help_panel=WHAT,
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Modules to leave as they are: names, classes or [cyan]re:[/cyan]patterns. "
        "Repeat it or separate by commas. Default: lm_head.",
        rich_help_panel=WHAT,
    ),
]
SmoothQuant = Annotated[
    float | None,
    typer.Option(
        metavar="STRENGTH",
        help="Move outliers of activations into weights first, 0 to 1; 0.5 is usual, 0.8 for models with large "
        "outliers. For schemes that quantize activations.",
        rich_help_panel=WHAT,
    ),
]
Sparsity = Annotated[
    float | None,
    typer.Option(
        metavar="PART",
        help="Part of the weights that sparsegpt, wanda or magnitude set to zero. Default: 0.5.",
        rich_help_panel=WHAT,
    ),
]
MaskStructure = Annotated[
    str | None,
    typer.Option(
        metavar="N:M",
        help="Where zeros lie: 2:4 keeps two of every four weights, as sparse tensor cores want it. Default: anywhere.",
        rich_help_panel=WHAT,
    ),
]
KVCacheScheme = Annotated[
    str | None,
    typer.Option(
        metavar="fp8|int8",
        help="Quantize what attention keeps of earlier tokens. Default: it stays as it is.",
        rich_help_panel=WHAT,
    ),
]
Recipe = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A recipe of llm-compressor in YAML, instead of the options above: several modifiers, each with its "
        "targets. Checkpoints hold theirs as recipe.yaml.",
        rich_help_panel=WHAT,
    ),
]
Pack = Annotated[
    bool,
    typer.Option(
        "--pack/--no-pack",
        help="Join texts to samples of full length, or pad each text to its own.",
        rich_help_panel=DATA,
    ),
]
Pipeline = Annotated[
    str | None,
    typer.Option(
        metavar="P",
        help="[cyan]sequential[/cyan] calibrates one subgraph after the other, each on what the compressed ones "
        "before it really output; [cyan]layer_sequential[/cyan] does so without a trace of the model; "
        "[cyan]basic[/cyan] runs the whole model at once; [cyan]datafree[/cyan] runs nothing; "
        "[cyan]independent[/cyan]: each step its own. Default: what the algorithm needs.",
        rich_help_panel=HOW,
    ),
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--targets",
        metavar="T",
        help="Sequential targets: class names, module names or [cyan]re:[/cyan]patterns at which the model is cut into "
        "subgraphs. Repeat it or separate by commas. Default: the decoder layers.",
        rich_help_panel=HOW,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="Text or chats: a txt, jsonl, json, csv or parquet file, a folder of those, or a [cyan]datasets[/cyan] id "
        "such as wikitext:wikitext-2-raw-v1:train. Default: text that fxcalib ships.",
        rich_help_panel=DATA,
    ),
]
TargetsPerSubgraph = Annotated[
    int,
    typer.Option(min=1, metavar="N", help="Sequential targets in each subgraph.", rich_help_panel=HOW),
]


PropagateError = Annotated[
    bool,
    typer.Option(
        "--propagate-error/--no-propagate-error",
        help="Calibrate each subgraph on what the compressed ones before it output, or all on the original model's "
        "values, in one pass each.",
        rich_help_panel=HOW,
    ),
]
TextColumn = Annotated[
    str | None,
    typer.Option(
        metavar="C[,C]",
        help="Column of text, or of lists of messages, or several that are joined; the last is the completion. "
        "Default: text, else messages, conversations, or prompt,completion.",
        rich_help_panel=DATA,
    ),
]
CompletionOnly = Annotated[
    bool,
    typer.Option(
        "--completion-only",
        help="Take statistics of completions only: what the assistant says in chats, or the last of several columns.",
        rich_help_panel=DATA,
    ),
]
Streaming = Annotated[
    bool,
    typer.Option(
        "--streaming", help="Fetch rows of a datasets id as they are needed, not all of them.", rich_help_panel=DATA
    ),
]
Batches = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Batches of one's own, instead of text: a list of dicts of tensors, saved with torch.save.",
        rich_help_panel=DATA,
    ),
]
Samples = Annotated[int | None, typer.Option(min=1, metavar="N", help="Number of samples.", rich_help_panel=DATA)]
SequenceLength = Annotated[int | None, typer.Option(min=1, metavar="N", help="Tokens a sample.", rich_help_panel=DATA)]
BatchSize = Annotated[int | None, typer.Option(min=1, metavar="N", help="Samples a batch.", rich_help_panel=DATA)]
MicroBatch = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        parser=_size_or_auto,
        metavar="N|auto",
        help="Samples a batch. Default: auto, as many as keep the device busy.",
        rich_help_panel=DATA,
    ),
]
BatchFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A batch to trace with: keyword arguments of the model, saved with torch.save. Default: one is made.",
        rich_help_panel=DATA,
    ),
]
Seed = Annotated[int, typer.Option(metavar="N", help="Chooses the samples.", rich_help_panel=DATA)]
Suspended = Annotated[
    bool,
    typer.Option(
        "--suspended",
        help="With --pipeline layer_sequential: let the model's own forwards wait at each layer, instead of calling "
        "the layers in a chain. For models whose layers form no chain.",
        rich_help_panel=HOW,
    ),
]
Offload = Annotated[
    str,
    typer.Option(
        metavar="auto|cpu|none",
        help="Where activations wait between passes: on the device as far as they fit, in host memory, on the device.",
        rich_help_panel=HOW,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(metavar="D", help="cpu, cuda, cuda:1, ...", rich_help_panel=HOW),
]
Dtype = Annotated[
    str,
    typer.Option(metavar="T", help="auto (as stored), bfloat16, float16 or float32.", rich_help_panel=HOW),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the Python code that comes with the model.", rich_help_panel=HOW),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one line of JSON on standard output and nothing else.", rich_help_panel=OUTPUT),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.", rich_help_panel=OUTPUT)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.", rich_help_panel=OUTPUT)]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a checkpoint that fxcalib wrote.", rich_help_panel=OUTPUT)
]

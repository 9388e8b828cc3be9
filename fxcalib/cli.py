"""The command line: options to keyword arguments, errors to exit codes. Heavy imports wait until they are needed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxcalib.errors import FxcalibError, OptionError

if TYPE_CHECKING:
    from fxcalib.display import RichProgress

UNTRACEABLE = 1
BAD_INPUT = 2
INTERRUPTED = 130

_SCHEMES = "W4A16, W4A16_ASYM, W8A16, W8A8, FP8, FP8_DYNAMIC, ... (the presets of compressed-tensors)"

app = typer.Typer(
    name="fxcalib",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Quantize PyTorch language models after training: INT4, INT8 and FP8 checkpoints for transformers and vLLM.",
    epilog="Begin with [bold]fxcalib quantize[/bold]: it needs no model and no data, and shows what calibration gains.",
)

Algorithm = Annotated[
    str,
    typer.Option(
        "--algorithm",
        "-a",
        metavar="A",
        help="[cyan]gptq[/cyan] rounds each weight in view of the errors so far, and needs data; "
        "[cyan]rtn[/cyan] rounds to nearest.",
        rich_help_panel="What to do",
    ),
]
Scheme = Annotated[
    str,
    typer.Option("--scheme", "-s", metavar="S", help=_SCHEMES, rich_help_panel="What to do"),
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Weights that share a scale, along the inputs. Smaller is more exact and larger on disk. "
        "Default: the scheme's.",
        rich_help_panel="What to do",
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Modules to leave as they are: names, classes or [cyan]re:[/cyan]patterns. "
        "Repeat it or separate by commas. Default: lm_head.",
        rich_help_panel="What to do",
    ),
]
Pack = Annotated[
    bool,
    typer.Option(
        "--pack/--no-pack",
        help="Join texts to samples of full length, or pad each text to its own.",
        rich_help_panel="Data",
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
        rich_help_panel="How it runs",
    ),
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--targets",
        metavar="T",
        help="Sequential targets: class names, module names or [cyan]re:[/cyan]patterns at which the model is cut into "
        "subgraphs. Repeat it or separate by commas. Default: the decoder layers.",
        rich_help_panel="How it runs",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="Text: a txt, jsonl, json, csv or parquet file, a folder of those, or a [cyan]datasets[/cyan] id such as "
        "wikitext:wikitext-2-raw-v1:train. Default: text that fxcalib ships.",
        rich_help_panel="Data",
    ),
]
TargetsPerSubgraph = Annotated[
    int,
    typer.Option(min=1, metavar="N", help="Sequential targets in each subgraph.", rich_help_panel="How it runs"),
]


def _size_or_auto(text: str) -> int | None:
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a number of samples nor auto") from None


PropagateError = Annotated[
    bool,
    typer.Option(
        "--propagate-error/--no-propagate-error",
        help="Calibrate each subgraph on what the compressed ones before it output, or all on the original model's "
        "values, in one pass each.",
        rich_help_panel="How it runs",
    ),
]
TextColumn = Annotated[
    str | None,
    typer.Option(metavar="C", help="Column that holds the text. Default: text.", rich_help_panel="Data"),
]
Samples = Annotated[int | None, typer.Option(min=1, metavar="N", help="Number of samples.", rich_help_panel="Data")]
SequenceLength = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Tokens a sample.", rich_help_panel="Data")
]
BatchSize = Annotated[int | None, typer.Option(min=1, metavar="N", help="Samples a batch.", rich_help_panel="Data")]
MicroBatch = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        parser=_size_or_auto,
        metavar="N|auto",
        help="Samples a batch. Default: auto, as many as keep the device busy.",
        rich_help_panel="Data",
    ),
]
BatchFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A batch to trace with: keyword arguments of the model, saved with torch.save. Default: one is made.",
        rich_help_panel="Data",
    ),
]
Seed = Annotated[int, typer.Option(metavar="N", help="Chooses the samples.", rich_help_panel="Data")]
Suspended = Annotated[
    bool,
    typer.Option(
        "--suspended",
        help="With --pipeline layer_sequential: let the model's own forwards wait at each layer, instead of calling "
        "the layers in a chain. For models whose layers form no chain.",
        rich_help_panel="How it runs",
    ),
]
Offload = Annotated[
    str,
    typer.Option(
        metavar="auto|cpu|none",
        help="Where activations wait between passes: on the device as far as they fit, in host memory, on the device.",
        rich_help_panel="How it runs",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(metavar="D", help="cpu, cuda, cuda:1, ...", rich_help_panel="How it runs"),
]
Dtype = Annotated[
    str,
    typer.Option(metavar="T", help="auto (as stored), bfloat16, float16 or float32.", rich_help_panel="How it runs"),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run the Python code that comes with the model.", rich_help_panel="How it runs"
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one line of JSON on standard output and nothing else.", rich_help_panel="Output"
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.", rich_help_panel="Output")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.", rich_help_panel="Output")]


def main() -> None:
    """Entry point of `fxcalib` and `python -m fxcalib`."""
    try:
        arguments = gathered(sys.argv[1:])
    except OptionError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(BAD_INPUT) from None
    app(args=arguments)


_MANY = ("--ignore", "--targets")


def gathered(arguments: list[str]) -> list[str]:
    """`arguments` in which an option of `_MANY` that is followed by several names is repeated for each of them.

    That is so behind MODEL, given first; before it, one word is the name, and the next is MODEL if it is a folder or
    has a slash, which no name of a module has.

    Raises:
        OptionError: a second word before MODEL that may be a name or MODEL.
    """
    rewritten: list[str] = []
    option, taken, positionals = "", 0, 0
    for argument in arguments:
        if argument.startswith("-"):
            option, taken = "" if "=" in argument else argument, 0
        elif option in _MANY and taken and positionals > 1:
            rewritten.append(option)
        elif option in _MANY and taken and not ("/" in argument or Path(argument).is_dir()):
            raise OptionError(
                f"{argument!r} behind {option} may be another name or MODEL, as MODEL does not come first; write "
                f"fxcalib {arguments[0]} MODEL {option} NAME NAME, or separate the names by commas"
            )
        elif option and not taken:
            taken = 1
        else:
            option, positionals = "", positionals + 1
        rewritten.append(argument)
    return rewritten


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


@app.command(
    epilog="[bold]Examples[/bold]\n\n"
    "fxcalib quantize\n\n"
    "fxcalib quantize HuggingFaceTB/SmolLM2-135M-Instruct --group-size 64 --eval\n\n"
    "fxcalib quantize ./my-model --scheme FP8_DYNAMIC --algorithm rtn -o my-model-fp8\n\n"
    "fxcalib quantize ./my-model --data chats.jsonl --samples 512 --seq-len 2048 --ignore lm_head,re:.*router"
)
def quantize(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A model folder or a Hugging Face id. Without it, a small model that fxcalib ships is quantized with "
            "and without calibration and the results are compared.",
        ),
    ] = None,
    algorithm: Algorithm = "gptq",
    scheme: Scheme = "W4A16",
    group_size: GroupSize = None,
    ignore: Ignore = None,
    data: Data = None,
    text_column: TextColumn = None,
    samples: Samples = None,
    seq_len: SequenceLength = None,
    batch_size: MicroBatch = None,
    pack: Pack = True,
    seed: Seed = 0,
    pipeline: Pipeline = None,
    targets: Targets = None,
    targets_per_subgraph: TargetsPerSubgraph = 1,
    propagate_error: PropagateError = True,
    suspended: Suspended = False,
    offload: Offload = "auto",
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="Folder of the checkpoint. Default: MODEL-SCHEME in the current folder.",
            rich_help_panel="Output",
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace a checkpoint that fxcalib wrote.", rich_help_panel="Output"),
    ] = False,
    evaluate: Annotated[
        bool,
        typer.Option("--eval", help="Measure perplexity on held-out text before and after.", rich_help_panel="Output"),
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Print where the time went.", rich_help_panel="Output")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Quantize a model and save it as a compressed-tensors checkpoint."""
    options: dict[str, Any] = {
        "algorithm": algorithm,
        "scheme": scheme,
        "group_size": group_size,
        "ignore": _names(ignore),
        "targets": _names(targets),
        "data": data,
        "text_column": text_column,
        "samples": samples,
        "seq_len": seq_len,
        "batch_size": batch_size,
        "pack": pack,
        "pipeline": pipeline,
        "targets_per_subgraph": targets_per_subgraph,
        "propagate_error": propagate_error,
        "suspended": suspended,
        "offload": offload,
        "device": device,
        "dtype": dtype,
        "seed": seed,
        "profile": profile,
        "overwrite": overwrite,
        "trust_remote_code": trust_remote_code,
    }
    given = {name: value for name, value in options.items() if value is not None}
    with _reported(debug=debug, quiet=quiet, as_json=as_json) as progress:
        if model is None:
            from fxcalib import demo

            if output is None:  # what an earlier try left in its default place is only that
                output, given["overwrite"] = default_output(demo.NAME, scheme), True
            comparison = demo.compare(output=output, progress=progress, **given)
            report, table = comparison.report, comparison.table()
        else:
            from fxcalib import api

            target = default_output(model, scheme) if output is None else output
            report, table = api.quantize(model, output=target, evaluate=evaluate, progress=progress, **given), None
    if as_json:
        _print_json(report.summary())
    elif table is not None:
        from rich.console import Console

        Console().print(table)
        typer.echo("".join(f"{line}\n" for line in report.profile_table()), nl=False)
        typer.echo(f"The checkpoint is in {report.output}")
    else:
        typer.echo(str(dataclasses.replace(report, warnings=())))  # they were printed when they arose


@app.command(
    name="eval",
    epilog="[bold]Examples[/bold]\n\n"
    "fxcalib eval SmolLM2-135M-Instruct-W4A16\n\n"
    "fxcalib eval SmolLM2-135M-Instruct-W4A16 --reference HuggingFaceTB/SmolLM2-135M-Instruct --data wiki.jsonl",
)
def evaluate_command(
    model: Annotated[
        str, typer.Argument(metavar="DIR", help="A model folder, quantized or not, or a Hugging Face id.")
    ],
    reference: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Measure the KL divergence to this model, usually the original."),
    ] = None,
    data: Data = None,
    text_column: TextColumn = None,
    samples: Samples = None,
    seq_len: SequenceLength = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
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
    with _reported(debug=debug, quiet=quiet, as_json=as_json) as progress:
        from fxcalib.evaluation import evaluate

        result = evaluate(model, reference, progress=progress, **given)
    if as_json:
        _print_json(dataclasses.asdict(result))
    else:
        typer.echo(str(result))


@app.command(
    epilog="[bold]Examples[/bold]\n\n"
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
            rich_help_panel="Output",
        ),
    ],
    expand: Annotated[
        bool,
        typer.Option("--expand", help="Draw repeated subgraphs one by one.", rich_help_panel="Output"),
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="fxcalib_report.json of a run: its errors and times are shown with the graph.",
            rich_help_panel="Output",
        ),
    ] = None,
    targets: Targets = None,
    targets_per_subgraph: TargetsPerSubgraph = 1,
    batch: BatchFile = None,
    samples: Samples = None,
    seq_len: SequenceLength = None,
    batch_size: BatchSize = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Draw the graph of a model, cut into the subgraphs that calibration runs; only its config is loaded."""
    options: dict[str, Any] = {
        "report": report,
        "targets": _names(targets),
        "targets_per_subgraph": targets_per_subgraph,
        "batch_file": batch,
        "samples": samples,
        "seq_len": seq_len,
        "batch_size": batch_size,
        "expand": expand,
        "trust_remote_code": trust_remote_code,
    }
    given = {name: value for name, value in options.items() if value is not None}
    with _reported(debug=debug, quiet=quiet, as_json=False):
        from fxcalib.viz.command import draw

        failure = draw(model, output, **given)
    if failure is not None:
        typer.echo(f"error: {failure}\nThe module tree is in {output}", err=True)
        raise typer.Exit(UNTRACEABLE)
    typer.echo(f"The graph is in {output}")


@app.command(
    name="trace",
    help="Trace a model and list what is found and assumed, or explain why it cannot be traced; only its config is "
    "loaded.\n\n"
    "A traced model is cut at its targets (the decoder layers) into subgraphs that calibration runs one after another. "
    "A guard is what the trace assumes of a batch, with the line of the model that assumes it: a batch that breaks one "
    "is traced anew. Where a model cannot be traced, its line, the calls that lead there, the values on it and code "
    "that helps are printed.",
    epilog="[bold]Examples[/bold]\n\n"
    "fxcalib trace HuggingFaceTB/SmolLM2-135M-Instruct\n\n"
    "fxcalib trace ./my-model --verify\n\n"
    "fxcalib trace ./my-model --batch batch.pt --targets Linear --json\n\n"
    "[bold]Exit codes[/bold]\n\n"
    "0: traced, and exact where --verify asked. 1: cannot be traced, which is explained, or not exact. "
    "2: model, batch or options are wrong.",
)
def trace_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or a Hugging Face id.")],
    targets: Targets = None,
    targets_per_subgraph: TargetsPerSubgraph = 1,
    batch: BatchFile = None,
    seq_len: SequenceLength = None,
    batch_size: BatchSize = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Load the weights as well, run the model and its subgraphs on the batch and on one of other sizes, "
            "and compare what they return bit for bit.",
            rich_help_panel="How it runs",
        ),
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Trace a model and list what is found and assumed, or explain why it cannot be traced."""
    options: dict[str, Any] = {
        "targets": _names(targets),
        "targets_per_subgraph": targets_per_subgraph,
        "batch_file": batch,
        "seq_len": seq_len,
        "batch_size": batch_size,
        "check": verify,
        "trust_remote_code": trust_remote_code,
    }
    given = {name: value for name, value in options.items() if value is not None}
    with _reported(debug=debug, quiet=quiet, as_json=as_json):
        from fxcalib.trace_report import TraceReport, trace_command

        found = trace_command(model, **given)
    exact = isinstance(found, TraceReport) and found.exact
    if as_json:
        _print_json(found.to_dict())
    elif isinstance(found, TraceReport):
        typer.echo(str(found))
    else:
        typer.echo(f"error: {found}", err=True)
    if not exact:
        raise typer.Exit(UNTRACEABLE)


@app.command(
    name="plan",
    epilog="[bold]Examples[/bold]\n\n"
    "fxcalib plan meta-llama/Llama-3.1-70B --samples 512 --seq-len 2048\n\n"
    "fxcalib plan ./my-model --scheme FP8 --algorithm rtn --calibrate-machine",
)
def plan_command(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A model folder or a Hugging Face id; only its config is read."),
    ] = None,
    algorithm: Algorithm = "gptq",
    scheme: Scheme = "W4A16",
    group_size: GroupSize = None,
    ignore: Ignore = None,
    data: Data = None,
    text_column: TextColumn = None,
    samples: Samples = None,
    seq_len: SequenceLength = None,
    batch_size: MicroBatch = None,
    pack: Pack = True,
    seed: Seed = 0,
    pipeline: Pipeline = None,
    targets: Targets = None,
    targets_per_subgraph: TargetsPerSubgraph = 1,
    propagate_error: PropagateError = True,
    suspended: Suspended = False,
    offload: Offload = "auto",
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="Folder to be checked.", rich_help_panel="Output"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="As quantize takes it.", rich_help_panel="Output")
    ] = False,
    evaluate: Annotated[
        bool, typer.Option("--eval", help="Taken, but evaluation is not planned.", rich_help_panel="Output")
    ] = False,
    calibrate_machine: Annotated[
        bool,
        typer.Option(
            "--calibrate-machine",
            help="Measure first how fast this machine multiplies and copies, to estimate times from now on.",
            rich_help_panel="How it runs",
        ),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what quantize would do with the same options, and the memory it would take, without weights and data."""
    options: dict[str, Any] = {
        "algorithm": algorithm,
        "scheme": scheme,
        "group_size": group_size,
        "ignore": _names(ignore),
        "samples": samples,
        "seq_len": seq_len,
        "batch_size": batch_size,
        "pack": pack,
        "pipeline": pipeline,
        "targets_per_subgraph": targets_per_subgraph,
        "propagate_error": propagate_error,
        "suspended": suspended,
        "targets": _names(targets),
        "offload": offload,
        "device": device,
        "dtype": dtype,
        "seed": seed,
        "output": output,
        "overwrite": overwrite,
        "calibrate_machine": calibrate_machine,
        "trust_remote_code": trust_remote_code,
    }
    given = {name: value for name, value in options.items() if value is not None}
    with _reported(debug=debug, quiet=quiet, as_json=as_json):
        from fxcalib import api

        found = api.plan(model, **given)
    if as_json:
        _print_json(found.to_dict())
    else:
        typer.echo(str(found))


def default_output(model: str, scheme: str) -> Path:
    """Folder of the checkpoint where none was named: after model and scheme, in the current folder."""
    return Path(f"{Path(model).expanduser().resolve().name}-{scheme}")


def _names(values: list[str] | None) -> list[str] | None:
    """Names given one by one or separated by commas; a pattern is never split, as it may hold commas itself."""
    if values is None:
        return None
    return [name for value in values for name in ([value] if value.startswith("re:") else value.split(",")) if name]


@contextlib.contextmanager
def _reported(*, debug: bool, quiet: bool, as_json: bool) -> Iterator[RichProgress]:
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


def _print_json(values: dict[str, Any]) -> None:
    from fxcalib.report import plain

    typer.echo(json.dumps(plain(values), allow_nan=False))

"""`python -m benchmarks NAME` runs one benchmark; without a name, it lists them."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

BENCHMARKS = {
    "overhead": "a sequential calibration that does nothing against two plain forwards, then `gptq`",
    "gptq": "time, memory and quality of GPTQ W4A16 on SmolLM2-135M, beside llm-compressor",
    "peaks": "predicted against measured peaks of memory on three models of different shapes",
    "planning_time": "how long planning takes for models of 8 to 671 billion parameters; bytes of masks",
    "speed": "seconds of calibration beside llm-compressor and beside the least that the machine allows",
    "tracing_time": "how long tracing and partitioning take for models of 8 to 671 billion parameters",
    "zoo": "tracing and partitioning exactly: every architecture of transformers as a tiny model, beside other tools",
}
"""Name -> one line. Each is a module `benchmarks.NAME` with `add_arguments(parser)` and `run(arguments)`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark that `arguments` name; the exit status."""
    listing = "\n".join(f"  {name:<15}{line}" for name, line in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measurements of fxcalib on real models, beside other tools.",
        epilog=f"benchmarks:\n{listing}\n\n`python -m benchmarks NAME --help` lists the options of one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="name", metavar="NAME")
    given = list(sys.argv[1:] if arguments is None else arguments)
    for name, line in BENCHMARKS.items():
        command = commands.add_parser(name, description=line)
        if given[:1] == [name]:  # the others need not be imported
            importlib.import_module(f"benchmarks.{name}").add_arguments(command)
    parsed = parser.parse_args(given)
    if parsed.name is None:
        parser.print_help()
        return 0
    importlib.import_module(f"benchmarks.{parsed.name}").run(parsed)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The command line of moebench. Every command is imported only when it is called: --help is answered at once."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from ..contracts import MoebenchError
from ..version import __version__
from .printable import printable

RUN_HELP = """\
Settings are NAME=VALUE pairs, composed by Hydra. Examples:
  moebench run suite=selftest
  moebench run suite=throughput model=small axes.backend=[eager,grouped] axes.routing=[topk,moepp]
  moebench run suite=throughput axes.routing=[topk,moepp] params.routing.moepp.tau=[0.25,0.75]
  moebench run experiment=quick
  moebench run -m suite=selftest seed=0,1,2
Axes: model structure routing quantization sparsity backend traffic tokens dtype pass boundary threads residency.
Each takes a value, a list, or `all`. `moebench list` shows every name.
"""


COMPARE_HELP = """\
Runs are taken apart, so their times get no verdict: `moebench gate` gives one. Exit status: 0, or 1 where a metric
without chance in it, accuracy on the same items, or the correctness of a case regressed from RUN_A to RUN_B. Of one
run alone, the accuracy of its methods is compared item by item with the one that changes least. Examples:
  moebench compare latest~1 latest
  moebench compare latest
"""

GATE_HELP = """\
Exit status: 0 not regressed, 1 regressed, 3 inconclusive, 4 too noisy to tell, 2 a mistake in the command. Examples:
  moebench gate --base main suite=selftest
  moebench gate --base HEAD~1 --candidate HEAD suite=throughput model=small axes.tokens=64 --budget 8m
  moebench gate --base-backend eager --candidate-backend grouped suite=selftest
  moebench gate --base main --target my_package.bench:make_trial
"""


ADVISE_HELP = """\
MODEL is a folder, a config.json, a *.safetensors.index.json, a *.gguf, or owner/name on the hub; no weight is read.
Sizes: 24G and 24GiB are powers of 1024, 24GB is one of 1000; 32k tokens are 32768. Everything is predicted by a model
of memory tiers and says so. Examples:
  moebench advise ./Mixtral-8x7B-v0.1 --vram 24G --ram 64G --context 32k
  moebench advise config.json --device rtx-5090 --vram 32G --ram 128G --rate link=50G --form int4
  moebench advise model.gguf --ram 16G --goal throughput --json
"""


PARETO_HELP = """\
Axes x: tpot latency throughput bytes resident bits disk energy. Axes y: ppl kl bpb agreement error accuracy:TASK. A
condition is SQL over the columns of view latest, and x, y, their bounds x_lo, x_hi, y_lo, y_hi. Examples:
  moebench pareto
  moebench pareto --x bytes --y kl --where "backend = 'eager' AND quantization <> 'none'"
  moebench pareto --page pareto.html --price-per-hour 0.35
"""


TRACE_HELP = """\
A trace says which experts every layer asked for, step by step. Examples:
  moebench trace record tinymoe -o tinymoe.parquet --tokens 128
  moebench trace record hf model.path=owner/name -o mine.parquet --prompt "Once upon a time"
  moebench trace record smollm2 params.structure.split.k=2 -o split.parquet --text book.txt
  moebench trace synthesize sticky stay=0.8 layers=16 experts=64 k=8 -o sticky.parquet
  moebench trace inspect mine.parquet --capacity 0.25 --capacity 0.5
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status. A mistake is told in one sentence, without a traceback."""
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command not in ("run", "gate", "trace"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command is None:
        parser.print_help()
        return 2
    options.settings = [*getattr(options, "settings", []), *rest]
    module, function = options.function.split(":")
    status = 0
    try:
        status = int(getattr(importlib.import_module(f"moebench.bench.{module}"), function)(options))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return status
    except KeyboardInterrupt:
        print("moebench: interrupted; finished groups are kept, and the same command goes on.", file=sys.stderr)
        return 130
    except Exception as error:
        if not isinstance(error, MoebenchError) and type(error).__name__ not in ("ResultsError", "DatabaseBusyError"):
            traceback.print_exc()
            print("moebench: this is a mistake of ours; please report it with the lines above.", file=sys.stderr)
            return 2  # and not Python's 1, which says "regressed" or "a case failed"
        print(f"moebench: {printable(str(error))}", file=sys.stderr)
        return 2


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="moebench", description="Benchmarks Mixture-of-Experts layers and models on one scale."
    )
    parser.add_argument("--version", action="version", version=f"moebench {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_run(commands)
    _add_gate(commands)
    _add_compare(commands)
    _add_trend(commands)
    _add_pareto(commands)
    _add_advise(commands)
    report = _add(commands, "report", "commands:report", "write the interactive HTML report")
    report.add_argument("--output", "-o", help="file to write (default: report.html in the store)")
    report.add_argument("--run", help="run id (default: the latest)")
    ingest = _add(commands, "ingest", "commands:ingest", "bring the database up to date with the parts")
    ingest.add_argument("source", nargs="?", choices=("pytest-benchmark",), help="first take in a file of this tool")
    ingest.add_argument("file", nargs="?", help="the file, such as that of --benchmark-json")
    sql = _add(commands, "sql", "commands:sql", "query the results")
    sql.add_argument("query", nargs="?", help="one SELECT; without it the tables and views are listed")
    sql.add_argument("--format", choices=("table", "csv", "json"), default="table")
    export = _add(commands, "export", "commands:export", "write the results to open files")
    export.add_argument("target", help="folder to write")
    export.add_argument("--format", choices=("parquet", "csv"), default="parquet")
    export.add_argument("--table", action="append", help="only this table or view (may be repeated)")
    names = _add(commands, "list", "commands:list_plugins", "show every plug-in with its availability")
    names.add_argument("kind", nargs="?", help="only this kind, such as backend or routing")
    names.add_argument("--plugin", action="append", default=[], metavar="FILE")
    _add(commands, "doctor", "commands:doctor", "say what this machine can and cannot do")
    models = _add(commands, "models", "commands:models", "fetch or train a model, or say which there are")
    models.add_argument("action", nargs="?", choices=("list", "fetch", "train"), default="list")
    models.add_argument("name", nargs="?")
    models.add_argument(
        "settings", nargs="*", metavar="NAME=VALUE", help="parameters: model.NAME to fetch, NAME to train"
    )
    models.add_argument("--quiet", action="store_true", help="print errors only")
    _add_trace(commands)
    papers = _add(commands, "papers", "papers:papers", "check the claims of published systems here")
    papers.add_argument("keys", nargs="*", help="which papers (default: all)")
    papers.add_argument("--list", action="store_true", help="show the claims and what they cost, and run nothing")
    papers.add_argument("--quiet", action="store_true")
    return parser


def _add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    run = _add(commands, "run", "run:run", "measure", RUN_HELP)
    run.add_argument("settings", nargs="*", metavar="NAME=VALUE")
    run.add_argument(
        "-m", "--multirun", action="store_true", help="one run for each combination of NAME=A,B (hosts, models, seeds)"
    )
    run.add_argument("--plan", action="store_true", help="show what would run, and run nothing")
    run.add_argument("--shard", metavar="I/N", help="only every n-th group, for several hosts")
    run.add_argument("--quiet", action="store_true", help="print errors only")
    run.add_argument("--strict", action="store_true", help="flags count as failures")
    run.add_argument("--report", action="store_true", help="write the HTML report at the end")


def _add_gate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    gate = _add(commands, "gate", "gate.command:gate", "judge a candidate against a base, taken in turns", GATE_HELP)
    gate.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="as for run; default suite=selftest")
    for side, what in (("base", "what to compare with"), ("candidate", "what is judged (default: the work tree)")):
        gate.add_argument(f"--{side}", metavar="REV", help=f"{what}: a git revision, or . for the work tree")
        gate.add_argument(f"--{side}-wheel", metavar="FILE", help=f"{side} is a wheel")
        gate.add_argument(f"--{side}-env", metavar="PYTHON", help=f"{side} is an environment with moebench")
        gate.add_argument(
            f"--{side}-backend", metavar="NAME", help=f"{side} is a backend, of the sources that are here"
        )
    gate.add_argument("--target", metavar="MODULE:MAKE_TRIAL", action="append", help="a callable of your own sources")
    gate.add_argument("--seconds", type=float, default=10.0, help="for turns of a case in the first 5 process pairs")
    gate.add_argument("--max-seconds", type=float, default=30.0, help="the same where a case stays undecided")
    gate.add_argument("--budget", metavar="TIME", help="wall time of measuring, such as 8m; covers what it can")
    gate.add_argument("--margin", type=float, default=0.01, help="a slow-down above this is a regression")
    gate.add_argument("--detect", type=float, default=0.05, help="a slow-down that must be excluded to pass")
    gate.add_argument(
        "--fail-on", action="append", default=[], metavar="inconclusive|noisy", help="exit 1 for this too"
    )
    gate.add_argument(
        "--metric-margin", metavar="NAME=FRACTION", action="append", default=[], help="let a metric move, as bytes=0.02"
    )
    gate.add_argument(
        "--item-margin",
        metavar="NAME=NUMBER",
        action="append",
        default=[],
        help="what the mean of a metric of items may lose, as acc=0.02",
    )
    gate.add_argument("--devices", metavar="LIST", help="share the cases over these devices, such as 0,1")
    for name in ("junit", "markdown", "json"):
        gate.add_argument(f"--{name}", metavar="FILE", help=f"write the result as {name}")
    gate.add_argument("--github", action="store_true", help="print annotations for GitHub Actions")
    gate.add_argument("--quiet", action="store_true", help="print errors only")


def _add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    compare = _add(
        commands,
        "compare",
        "compare_runs:compare",
        "describe two stored runs side by side, or the methods of one",
        COMPARE_HELP,
    )
    compare.add_argument("run_a", metavar="RUN_A", help="id or its beginning, latest, latest~1")
    compare.add_argument("run_b", metavar="RUN_B", nargs="?", help="the same; without it the methods of RUN_A")
    compare.add_argument("--json", action="store_true", help="print everything as JSON")


def _add_trend(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    trend = _add(commands, "trend", "trend:trend", "show the history of cases, with the points at which a level moved")
    trend.add_argument("--suite", help="only cases of this suite")
    trend.add_argument("--backend", help="only cases on this backend")
    trend.add_argument("--case", metavar="KEY", help="only the case with this key, or all whose keys begin so")
    trend.add_argument("--metric", default="time", metavar="NAME", help="time (default), or a metric such as bytes")
    trend.add_argument("--host", metavar="KEY|all", help="host key or its beginning, or all (default: this host)")


def _add_pareto(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    pareto = _add(commands, "pareto", "pareto:pareto", "show which methods are worth having", PARETO_HELP)
    pareto.add_argument("--x", default="tpot", metavar="AXIS", help="speed or size (default: tpot)")
    pareto.add_argument("--y", default="ppl", metavar="AXIS", help="quality (default: ppl)")
    pareto.add_argument("--where", metavar="SQL", help="only the cases that fit this condition")
    pareto.add_argument("--format", choices=("text", "json", "csv"), default="text")
    pareto.add_argument("--page", metavar="FILE", help="write all axes as one HTML file that needs no network instead")
    pareto.add_argument(
        "--price-per-hour", type=float, metavar="PRICE", help="what an hour of the machine costs, for costs of tokens"
    )


def _add_advise(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    advise = _add(commands, "advise", "advise.command:command", "say what of a model fits where", ADVISE_HELP)
    advise.add_argument("model", metavar="MODEL", nargs="?", help="a folder, a file, or a name on the hub")
    advise.add_argument("--vram", metavar="SIZE", help="memory of the GPU, such as 24G (default: this machine's)")
    advise.add_argument("--ram", metavar="SIZE", help="memory of the host, such as 64G (default: this machine's)")
    advise.add_argument("--context", metavar="TOKENS", default="4096", help="tokens of a sequence, such as 32k")
    advise.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at a time (default: 1)")
    advise.add_argument("--goal", choices=("tpot", "throughput"), default="tpot", help="what to rank by")
    advise.add_argument("--form", action="append", default=[], metavar="NAME", help="plan this form of the weights")
    advise.add_argument("--device", metavar="NAME", help="take rates from the data sheet of a GPU, such as rtx-5090")
    advise.add_argument(
        "--rate", action="append", default=[], metavar="NAME=RATE", help="vram link ram disk (byte/s), gpu cpu (flop/s)"
    )
    advise.add_argument("--skew", type=float, default=0.0, help="Zipf exponent of the experts' popularity (default: 0)")
    advise.add_argument("--measure", type=int, default=0, metavar="N", help="run the first N that this host can run")
    advise.add_argument("--validate", action="store_true", help="measure how far the predictions are off on this host")
    advise.add_argument("--top", type=int, default=10, metavar="N", help="lines to show (default: 10)")
    advise.add_argument("--json", action="store_true", help="print everything as JSON")


def _add_trace(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    trace = _add(commands, "trace", "trace_command:trace", "record, make up or look at routing traces", TRACE_HELP)
    actions = trace.add_subparsers(dest="action", metavar="ACTION", required=True)

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        parser = actions.add_parser(name, help=summary, description=summary)
        parser.set_defaults(function=f"trace_command:{name}")
        return parser

    def add_target(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--output", "-o", metavar="FILE", required=True, help="file to write, such as a.parquet")
        parser.add_argument("--force", action="store_true", help="replace a file that is there")

    record = add("record", "write down who goes where while a language model generates")
    record.add_argument("model", metavar="MODEL", help="its name here, such as tinymoe; hf is one of yours")
    record.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="as for run: model.NAME, axes.routing ...")
    add_target(record)
    record.add_argument("--tokens", type=int, default=128, help="steps after the prompt, one token each (default 128)")
    source = record.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="go on from this (default: the evaluation text's beginning)")
    source.add_argument("--text", metavar="FILE", help="read the tokens of a file, and generate none")
    synthesize = add("synthesize", "write a made-up trace of known statistics")
    synthesize.add_argument("kind", choices=("zipf", "sticky", "domains"))
    synthesize.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="steps, layers, experts, k, tokens ...")
    add_target(synthesize)
    inspect = add("inspect", "print what a trace says of itself")
    inspect.add_argument("file", metavar="FILE")
    inspect.add_argument(
        "--capacity", type=float, action="append", help="share of all experts that a cache holds (default 0.25)"
    )


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    function: str,
    summary: str,
    epilog: str | None = None,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=summary, description=summary, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(function=function)
    if name not in ("run", "trace"):
        parser.add_argument("--store", help="folder of the results (default: $MOEBENCH_STORE or ./results)")
    return parser


if __name__ == "__main__":
    sys.exit(main())

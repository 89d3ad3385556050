"""The command `valle`: one subcommand per job, imported when it is run.

`valle NAME ...` and `python -m valle NAME ...` call the `main(argv)` of the module that
`python -m valle.jobs.NAME` runs, with the same recipes and the same `--help`.
"""

import difflib
import importlib
import sys
from collections.abc import Collection, Sequence

COMMANDS = {
    "speech": {
        "speak": "speak a text in the voice of a recording, without a server",
        "serve": "start the HTTP endpoint, by default with the registry's champion",
        "starter-voices": "record two voices for an endpoint that has none",
        "synthesize": "speak the texts of a manifest, on Ray Data",
    },
    "data": {
        "corpus": "generate a corpus of speech with installed packages",
        "select-speakers": "select the natural and distinct speakers of a corpus",
        "prepare": "convert speech and text to the token dataset, on Ray Data",
        "spectrograms": "draw recordings as log-mel spectrograms",
    },
    "training": {
        "train": "train the AR and NAR models on a token dataset, on Ray Train",
        "train-codec": "train a narrow EnCodec on a corpus, on Ray Train",
        "train-quantizer": "train nano 2's quantizer on vocoder features",
        "curves": "draw the loss and word error rate of training runs",
    },
    "evaluation and registry": {
        "evaluate": "measure a model's word error rate, speaker similarity and quality",
        "evaluate-codec": "measure what a codec does to held-out recordings",
        "publish": "register two checkpoints as a version; promote it if the gate passes it",
        "model-versions": "list the registry's versions, promote one, roll back, add a report",
        "export": "write a version as a folder that can be shipped",
    },
    "operation": {
        "demo": "run all jobs on a small corpus, and speak a sentence",
        "keys": "make an API key for the endpoint",
        "validate-config": "check a Serve configuration strictly",
        "clean-cache": "remove from this node's cache what has not been used for a while",
        "check-cluster": "check the cluster launcher's file without a network",
        "include-results": "write the results of release/ into the documents",
        "bench": "run a benchmark: valle bench NAME",
    },
}
"""Subcommand and its summary, by group."""

BENCHMARKS = {
    "chapter": "stream a long text from the endpoint",
    "engine": "AR decoding: the engine against the plain decoder",
    "gpu": "correctness and speed on this machine's GPU",
    "nar": "NAR decoding",
    "prepare": "encoding of speech, batched against one file at a time",
    "scaling": "throughput of the endpoint while replicas are added",
    "serve": "the endpoint under load, against other arrangements",
    "soak": "the endpoint's memory over thousands of requests",
}
"""Benchmark and its summary."""

_MODULES = {
    "serve": "valle.serve.run",
    "keys": "valle.serve.web.keys",
    "validate-config": "valle.serve.web.validate_config",
    "bench gpu": "valle.jobs.bench.gpu.run",
}
"""Modules that are not named after their command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns its exit status, and 2 for an unknown one."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    names = [name for group in COMMANDS.values() for name in group]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_summary("valle", COMMANDS))
        return 0 if arguments else 2
    name, *rest = arguments
    if name == "bench":
        return _run_benchmark(rest)
    if name in names:
        return _run(name, rest)
    if _is_text(arguments, names):
        return _run("speak", arguments)
    return _refuse("valle", name, names)


def _run_benchmark(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_summary("valle bench", {"benchmarks": BENCHMARKS}))
        return 0 if arguments else 2
    name, *rest = arguments
    if name in BENCHMARKS:
        return _run(f"bench {name}", rest)
    return _refuse("valle bench", name, BENCHMARKS)


def _run(command: str, arguments: Sequence[str]) -> int:
    """Imports a subcommand's module and calls its `main`."""
    default = f"valle.jobs.{command.replace('-', '_').replace(' ', '.')}"
    module = importlib.import_module(_MODULES.get(command, default))
    sys.argv[0] = f"valle {command}"  # argparse takes the program's name from here
    return module.main(arguments) or 0


def _is_text(arguments: Sequence[str], names: Collection[str]) -> bool:
    """True for the form without a subcommand, `python -m valle "text" ref.wav out.wav`: three
    arguments or more, no subcommand among them, the first unlike all of them."""
    alike = difflib.get_close_matches(arguments[0], names)
    return len(arguments) >= 3 and not alike and not set(arguments) & set(names)


def _refuse(program: str, name: str, names: Collection[str]) -> int:
    """Reports an unknown subcommand with the nearest ones; returns the exit status."""
    nearest = " or ".join(difflib.get_close_matches(name, names))
    hint = f"did you mean {nearest}?" if nearest else f"see {program} --help"
    print(f"{program}: {name!r} is not a command; {hint}", file=sys.stderr)
    return 2


def _summary(program: str, groups: dict[str, dict[str, str]]) -> str:
    """Usage, and the subcommands with a line each."""
    lines = [f"usage: {program} NAME ...   ({program} NAME --help: its arguments)"]
    for group, commands in groups.items():
        lines += ["", group]
        lines += [f"  {name:<16} {summary}" for name, summary in commands.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

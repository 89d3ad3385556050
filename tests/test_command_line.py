"""The command `valle`: its subcommands, their help, what it does with a wrong one."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from valle import __main__ as command_line
from valle.__main__ import BENCHMARKS, COMMANDS, main

ROOT = Path(__file__).resolve().parent.parent
NAMES = [name for group in COMMANDS.values() for name in group]


@pytest.fixture(autouse=True)
def program_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["valle"])


def defines_main(path: Path) -> bool:
    body = ast.parse(path.read_text()).body
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in body)


def test_commands_hold_every_job() -> None:
    jobs = {path.stem for path in (ROOT / "jobs").glob("*.py")} - {"__init__"}
    assert jobs <= {name.replace("-", "_") for name in NAMES}
    benchmarks = {path.stem for path in (ROOT / "jobs/bench").glob("*.py") if defines_main(path)}
    assert set(BENCHMARKS) == {*benchmarks, "gpu"}
    assert len(NAMES) == len(set(NAMES))


def test_help_lists_every_command_and_imports_none() -> None:
    code = (
        "import sys; from valle.__main__ import main; status = main(['--help'])\n"
        "assert not {'torch', 'ray', 'numpy', 'mlflow'} & set(sys.modules); sys.exit(status)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = process.stdout.splitlines()
    for group, commands in COMMANDS.items():
        assert group in lines
        for name, summary in commands.items():
            assert f"  {name:<16} {summary}" in lines


@pytest.mark.parametrize("command", [*NAMES, *(f"bench {name}" for name in BENCHMARKS)])
def test_help_of_every_command(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if command == "bench":
        assert main([command, "--help"]) == 0
    else:
        with pytest.raises(SystemExit) as stop:
            main([*command.split(), "--help"])
        assert stop.value.code == 0
    usage = capsys.readouterr().out
    assert usage.startswith(f"usage: valle {command} ") or command == "bench gpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepar", "--recipe", "demo"], "valle: 'prepar' is not a command; did you mean prepare?"),
        (["train_codec"], "did you mean train-codec"),
        (["nonsense"], "valle: 'nonsense' is not a command; see valle --help"),
        (["--recipe", "demo", "prepare"], "valle: '--recipe' is not a command; see valle --help"),
        (["bench", "engin"], "valle bench: 'engin' is not a command; did you mean engine?"),
    ],
)
def test_main_refuses_an_unknown_command(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["bench"]])
def test_main_without_a_command_lists_them(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().out.startswith(f"usage: {' '.join(['valle', *arguments])} NAME")


@pytest.mark.parametrize(("result", "status"), [(None, 0), (0, 0), (1, 1)])
def test_main_returns_the_status_of_the_command(
    result: int | None, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[list[str], str]] = []

    class Module:
        @staticmethod
        def main(argv: list[str]) -> int | None:
            calls.append((argv, sys.argv[0]))
            return result

    modules = {"valle.jobs.train_codec": Module, "valle.serve.run": Module}
    monkeypatch.setattr(command_line.importlib, "import_module", modules.__getitem__)
    assert main(["train-codec", "--recipe", "codec"]) == status
    assert main(["serve", "--port", "1"]) == status
    assert calls == [(["--recipe", "codec"], "valle train-codec"), (["--port", "1"], "valle serve")]


@pytest.mark.parametrize(
    "arguments",
    [
        ["Hello there.", "reference.wav", "out.wav"],
        ["hello", "reference.wav", "out.wav", "--seed", "1"],
        ["--model", "release/nano", "Hello.", "reference.wav", "out.wav"],
    ],
)
def test_main_speaks_a_text_without_a_command(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The form before there were subcommands: `python -m valle "text" reference.wav out.wav`."""
    monkeypatch.setattr(command_line, "_run", lambda name, rest: (name, rest))
    assert main(arguments) == ("speak", arguments)

"""Documents name files, modules, commands and recipes that exist."""

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from valle.jobs import recipes

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "platform/*.md", "release/**/*.md")
    for path in ROOT.glob(pattern)
    if path.name not in ("LOG.md", "renamed.md", "report.md")  # of earlier commits; generated
)
FOLDERS = ("model", "platform", "jobs", "serve", "valle", "tests", "docs", "release")
NAMED = ("README.md", "CONTRIBUTING.md", "docs/structure.md", "docs/glossary.md")
"""Documents whose identifiers in backticks are names of the code."""


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _code_spans(path: Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def _slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_paths_in_documents_exist(path: Path) -> None:
    for span in _code_spans(path):
        if re.fullmatch(rf"(?:{'|'.join(FOLDERS)})/[\w./*-]*", span):
            assert list(ROOT.glob(span)), f"{_name(path)}: {span}"
        elif re.fullmatch(r"[\w/]+\.(?:py|md)", span):
            assert list(ROOT.rglob(span)), f"{_name(path)}: {span}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_links_in_documents_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if ":" in link:
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), f"{_name(path)}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
            assert anchor in map(_slug, headings), f"{_name(path)}: {link}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_modules_in_documents_import(path: Path) -> None:
    for dotted in re.findall(r"(?<![\w/.])valle(?:\.[a-z_]\w*)+(?::\w+)?", path.read_text()):
        name, _, attribute = dotted.partition(":")
        parts = name.split(".")
        try:
            owner: object = importlib.import_module(name)
        except ModuleNotFoundError:
            owner = importlib.import_module(".".join(parts[:-1]))
            attribute = parts[-1]
        assert not attribute or hasattr(owner, attribute), f"{_name(path)}: {dotted}"


@pytest.mark.parametrize("name", NAMED)
def test_identifiers_in_documents_occur_in_the_code(name: str) -> None:
    """`Class.method`, `CONSTANT` and `function_name` are words of the code."""
    files = [p for folder in FOLDERS[:6] for p in (ROOT / folder).rglob("*") if p.is_file()]
    words = set()
    for path in [*files, ROOT / "pyproject.toml", ROOT / "Makefile"]:
        if path.suffix in (".py", ".yaml", ".toml", ""):
            words |= set(re.findall(r"\w+", path.read_text()))
    for span in _code_spans(ROOT / name):
        if re.fullmatch(r"[A-Za-z_]\w*(?:\.\w+)*", span) and not span.endswith((".md", ".py")):
            missing = [word for word in span.split(".") if word not in words]
            assert not missing, f"{name}: {span}"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_log_is_narrow() -> None:
    lines = (ROOT / "docs/LOG.md").read_text().splitlines()
    assert not [number for number, line in enumerate(lines, 1) if len(line) > 100]


def test_old_names_lead_to_files_that_exist() -> None:
    """The table of moved files in renamed.md ends at files of today."""
    for line in (ROOT / "docs/renamed.md").read_text().split("\n## ")[1].splitlines():
        if line.startswith("| `"):
            new = line.rpartition("| `")[2].partition("`")[0]
            assert (ROOT / new).exists(), line


COMMAND = re.compile(r"(?:valle|python -m valle[\w.]*) .*")


def _commands(path: Path) -> Iterator[str]:
    """Commands in shell blocks and code spans; those with placeholders are left out."""
    text = path.read_text().replace("\\\n", " ")
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    for line in [*"\n".join(blocks).splitlines(), *_code_spans(path)]:
        command = line.partition(" #")[0].strip()
        if COMMAND.fullmatch(command) and not re.search(r"\.\.\.|\bNAME\b|\$", command):
            yield command


ALL_COMMANDS = sorted({command for path in DOCUMENTS for command in _commands(path)})


class ParsedError(Exception):
    """Raised in place of running a command whose arguments have been accepted."""


def _check_arguments(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises AssertionError for a command with an unknown argument, recipe or field."""
    words = shlex.split(command)
    name, arguments = ("valle.__main__", words[1:])
    if words[0] == "python":
        name, arguments = words[2], words[3:]
    main = importlib.import_module(name).main
    if name == "valle.__main__" and len(arguments) == 1:
        arguments = [*arguments, "--help"]  # prose that names a subcommand
    monkeypatch.setattr("sys.argv", ["valle"])  # `main` sets the program's name there
    _stop_after(monkeypatch, recipes, "load")  # a job with a recipe
    _stop_after(monkeypatch, argparse.ArgumentParser, "parse_args")  # any other
    try:
        status = main(arguments)
    except ParsedError:
        return
    except SystemExit as stop:
        status = stop.code
    assert status in (0, None), command


def _stop_after(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> None:
    original = getattr(owner, name)

    def stop(*arguments: object, **keywords: object) -> None:
        original(*arguments, **keywords)
        raise ParsedError

    monkeypatch.setattr(owner, name, stop)


@pytest.mark.parametrize("command", ALL_COMMANDS)
def test_commands_in_documents_parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments, recipe and overrides are accepted; nothing is run."""
    _check_arguments(command, monkeypatch)


@pytest.mark.parametrize("job", ["prepare", "train", "publish"])
def test_recipe_in_readme_is_complete(
    job: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    block = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)[0]
    (tmp_path / "mine.yaml").write_text(block)
    monkeypatch.chdir(tmp_path)
    _check_arguments(f"valle {job} --recipe mine.yaml", monkeypatch)

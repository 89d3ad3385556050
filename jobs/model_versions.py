"""Manages the versions in the model registry: history, promotion, rollback, reports.

valle model-versions history
valle model-versions promote 3 --reason "passes on the cluster's larger set"
valle model-versions rollback --reason "clicks in long sentences"
valle model-versions attach-report 3 data/evaluation/report.json
"""

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from valle.jobs.evaluation.report import read_report
from valle.platform import model_versions, registry
from valle.platform.bundle import read_bundle


def history() -> str:
    """Lists the versions, one per line: number, aliases, promotions and rollbacks with reasons."""
    lines = []
    for version in model_versions.list_versions():
        tags = version.tags
        events = [
            f"{tags[f'{event}_at']} {words}: {tags[f'{event}_because']}"
            for event, words in (("promoted", "promoted"), ("rolled_back", "rolled back"))
            if f"{event}_at" in tags
        ]
        lines.append(
            f"{version.number:>4}  {', '.join(version.aliases) or '-':<20} "
            f"{'; '.join(events) or 'never promoted'}"
        )
    return "\n".join(lines) or "no versions yet: publish one"


def attach_report(version: int, path: Path) -> None:
    """Adds a `report.json`, and the `report.md` beside it, to the version that it measured.

    Raises ValueError for a report of another model and FileNotFoundError.
    """
    report = read_report(str(path.absolute()))
    model = f"models:/{registry.MODEL_NAME}/{version}"
    measured = read_bundle(registry.resolve(model))
    if report.bundle != measured:
        raise ValueError(
            f"{path}: the report is of {report.model}, whose files are not those of version "
            f"{version}; evaluate with model={model}"
        )
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(path, Path(folder) / "report.json")
        if (page := path.with_name("report.md")).is_file():
            shutil.copyfile(page, Path(folder) / "report.md")
        model_versions.attach_report(version, Path(folder))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `python -m valle.jobs.model_versions history`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("history", help="list all versions with their promotions and rollbacks")
    promote = commands.add_parser("promote", help="make a version the champion without the gate")
    promote.add_argument("version", type=int)
    back = commands.add_parser(
        "rollback", help="make the champion's predecessor the champion again"
    )
    attach = commands.add_parser(
        "attach-report", help="add an evaluation's report to the version that it measured"
    )
    attach.add_argument("version", type=int)
    attach.add_argument("report", type=Path, help="report.json of `valle evaluate`")
    for command in (promote, back):
        command.add_argument("--reason", required=True, help="stored with the version")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "promote":
            model_versions.promote(arguments.version, f"forced: {arguments.reason}")
        elif arguments.command == "rollback":
            print(f"champion: version {model_versions.roll_back(arguments.reason)}")
        elif arguments.command == "attach-report":
            attach_report(arguments.version, arguments.report)
        print(history())
    except (ValueError, OSError, model_versions.LostRaceError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()

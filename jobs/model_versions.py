"""Manages the versions in the model registry: history, promotion without the gate, rollback.

python -m valle.jobs.model_versions history
python -m valle.jobs.model_versions promote 3 --reason "passes on the cluster's larger set"
python -m valle.jobs.model_versions rollback --reason "clicks in long sentences"
"""

import argparse
from collections.abc import Sequence

from valle.platform import registry


def history() -> str:
    """Lists the versions, one per line: number, aliases, promotions and rollbacks with reasons."""
    lines = []
    for version in registry.list_versions():
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
    for command in (promote, back):
        command.add_argument("--reason", required=True, help="stored with the version")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "promote":
            registry.promote(arguments.version, f"forced: {arguments.reason}")
        elif arguments.command == "rollback":
            print(f"champion: version {registry.roll_back(arguments.reason)}")
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    print(history())


if __name__ == "__main__":
    main()

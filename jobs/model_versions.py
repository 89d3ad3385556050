"""Which version is served: history, promotion by hand, rollback.

python -m valle.jobs.model_versions history
python -m valle.jobs.model_versions promote 3 --reason "passes on the cluster's larger set"
python -m valle.jobs.model_versions rollback --reason "clicks in long sentences"
"""

import argparse
from collections.abc import Sequence

from valle.platform import registry


def history() -> str:
    """A line per version: number, aliases, when and why it was promoted or rolled back."""
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
    commands.add_parser("history", help="all versions with what happened to them")
    promote = commands.add_parser("promote", help="make a version the champion, past the gate")
    promote.add_argument("version", type=int)
    back = commands.add_parser("rollback", help="make the champion's predecessor champion again")
    for command in (promote, back):
        command.add_argument("--reason", required=True, help="kept with the version")
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

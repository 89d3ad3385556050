"""Checks a cluster launcher's file for AWS without a network, and lists what is left to set.

    valle check-cluster cluster.yaml

Ray's schema ignores the contents of a `node_config`; botocore validates it here as the EC2 request
that it becomes. Security groups, instance profiles, instance metadata and Ray's token are checked
too. Values that are left to set hold `EDIT`.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from valle.platform import autoscaler
from valle.platform.cluster import CODE_ROOT

RAY_ONLY_KEYS = {"SubnetIds"}
"""Keys of a node_config that Ray removes from its request to EC2."""

PLACEHOLDER = "EDIT"
"""Marks a value that is left to set."""

_WRITTEN_FILE = re.compile(r"cat > (\S+) <<'?(\w+)'?\n(.*?)\n\2$", re.DOTALL | re.MULTILINE)
"""A here-document in a setup command: name, delimiter and content of the file it writes."""

_SOURCED_FILE = re.compile(r"(?:^|[;&|]\s*)(?:\.|source) +([^\s;&|]+)")
"""A file that a shell command reads into its environment."""


def problems(configuration: Mapping[str, Any]) -> Iterator[str]:
    """A line per problem of a configuration; none for a usable one."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        # a copy: Ray fills in its defaults first, in place
        validate_config(prepare_config(yaml.safe_load(yaml.safe_dump(dict(configuration)))))
    except Exception as error:  # jsonschema's, click's or a KeyError: Ray has no common class
        yield f"Ray refuses it: {str(error).splitlines()[0]}"
        return
    if "security_group" in configuration["provider"]:
        yield (
            "provider.security_group: Ray adds SSH from anywhere to a group that it makes; remove "
            "it, and name a group in each node_config.SecurityGroupIds"
        )
    for name, node in configuration["available_node_types"].items():
        for problem in _node_problems(node["node_config"]):
            yield f"{name}: {problem}"
    for place in ("head", "worker"):
        yield from _start_problems(configuration, place)


def _start_problems(configuration: Mapping[str, Any], place: str) -> Iterator[str]:
    """Problems of the commands that start Ray on the head or the workers: its token, its ports."""
    setup = [
        command
        for key in ("setup_commands", f"{place}_setup_commands")
        for command in configuration.get(key, [])
    ]
    files = {name: body for command in setup for name, _, body in _WRITTEN_FILE.findall(command)}
    field = f"{place}_start_ray_commands"
    for command in configuration.get(field, []):
        if "ray start" not in command:
            continue
        # the environment of `ray start`: what precedes it, and the files that are sourced there
        before, _, options = command.partition("ray start")
        sources = [*(files.get(name, "") for name in _SOURCED_FILE.findall(before)), before]
        environment = [
            word
            for line in "\n".join(sources).splitlines()
            for word in shlex.split(line, comments=True)
        ]
        if "RAY_AUTH_MODE=token" not in environment:
            yield f"{field}: without RAY_AUTH_MODE=token anyone may run code"
        if not any(
            name.endswith("/.ray/auth_token") for name in configuration.get("file_mounts", {})
        ):
            yield f"file_mounts: Ray's token, ~/.ray/auth_token, is missing; the {place} needs it"
        host = re.search(r"--dashboard-host[= ](\S+)", options)
        if host and host[1] not in ("127.0.0.1", "localhost"):
            yield (
                f"{field}: --dashboard-host={host[1]} takes jobs from more than the head itself; "
                "set 127.0.0.1"
            )


def _node_problems(node_config: Mapping[str, Any]) -> Iterator[str]:
    """Problems of a `node_config`, as EC2's RunInstances takes it."""
    import botocore.session
    from botocore.validate import ParamValidator

    service = botocore.session.get_session().get_service_model("ec2")
    request = {key: value for key, value in node_config.items() if key not in RAY_ONLY_KEYS}
    shape = service.operation_model("RunInstances").input_shape
    report = ParamValidator().validate({**request, "MinCount": 1, "MaxCount": 1}, shape)
    yield from str(report.generate_report()).splitlines()
    if "IamInstanceProfile" not in node_config:
        yield "IamInstanceProfile: missing; nodes have no other way to the bucket but keys"
    if not node_config.get("SecurityGroupIds"):
        yield "SecurityGroupIds: missing; Ray would make a group with SSH from anywhere"
    if node_config.get("MetadataOptions", {}).get("HttpTokens") != "required":
        yield "MetadataOptions.HttpTokens: not `required`; a request forged on a node gets its role"


def placeholders(text: str) -> list[str]:
    """The lines of a file that hold a placeholder, with their numbers."""
    return [
        f"line {number}: {line.strip()}"
        for number, line in enumerate(text.splitlines(), 1)
        if PLACEHOLDER in line and not line.lstrip().startswith("#")
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints problems, values left to set and node types; returns 1 if there are problems."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "file",
        nargs="?",
        type=Path,
        default=CODE_ROOT / "cluster.yaml",
        help="default: cluster.yaml of the repository",
    )
    text = parser.parse_args(argv).file.read_text()
    configuration = yaml.safe_load(text)
    errors = list(problems(configuration))
    for line in errors:
        print(f"wrong: {line}", file=sys.stderr)
    for line in placeholders(text):
        print(f"to set: {line}")
    if not errors:
        limits = autoscaler.parse_limits(configuration)
        for node in limits.node_types or ():
            print(
                f"may start: {node.max_count} x {node.name}, {node.cpus:g} CPUs, {node.gpus:g} GPUs"
            )
        print(f"          {limits.max_nodes} nodes together at most, beside the head")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())

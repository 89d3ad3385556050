"""Reads a cluster launcher's file for AWS before `ray up` does, without a network.

    python -m valle.jobs.check_cluster cluster.yaml

Ray's own schema looks at nothing inside a `node_config`; here botocore compares it with the
request that it becomes. Security groups, instance profiles, metadata and Ray's token are looked at
too. What is still to be set (`EDIT`) is listed.
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
"""Keys of a node_config that Ray takes out before it asks EC2 for nodes."""

PLACEHOLDER = "EDIT"


def problems(configuration: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong, one line each; nothing for a file that can be used."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        # Ray fills in its defaults first, and changes what it is given
        validate_config(prepare_config(yaml.safe_load(yaml.safe_dump(dict(configuration)))))
    except Exception as error:  # jsonschema's, click's or a KeyError: Ray has no class for it
        yield f"Ray refuses it: {str(error).splitlines()[0]}"
        return
    if "security_group" in configuration["provider"]:
        yield "provider.security_group: Ray adds SSH from anywhere to a group that it makes"
    for name, node in configuration["available_node_types"].items():
        for problem in _of_node(node["node_config"]):
            yield f"{name}: {problem}"
    for place in ("head", "worker"):
        yield from _of_start(configuration, place)


_WRITTEN = re.compile(r"cat > (\S+) <<'?(\w+)'?\n(.*?)\n\2$", re.DOTALL | re.MULTILINE)
"""A file that a command writes: its name, and what is in it."""

_SOURCED = re.compile(r"(?:^|[;&|]\s*)(?:\.|source) +([^\s;&|]+)")
"""A file that a command reads into its environment."""


def _of_start(configuration: Mapping[str, Any], place: str) -> Iterator[str]:
    """Whether Ray, as it is started on the head or the workers, asks for a token and has one."""
    setup = [
        command
        for key in ("setup_commands", f"{place}_setup_commands")
        for command in configuration.get(key, [])
    ]
    files = {name: body for command in setup for name, _, body in _WRITTEN.findall(command)}
    field = f"{place}_start_ray_commands"
    for command in configuration.get(field, []):
        if "ray start" not in command:
            continue
        before, _, options = command.partition("ray start")
        sources = [*(files.get(name, "") for name in _SOURCED.findall(before)), before]
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
            yield f"{field}: --dashboard-host={host[1]} takes jobs from more than the head itself"


def _of_node(node_config: Mapping[str, Any]) -> Iterator[str]:
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
    """Lines with a placeholder, numbered."""
    return [
        f"line {number}: {line.strip()}"
        for number, line in enumerate(text.splitlines(), 1)
        if PLACEHOLDER in line and not line.lstrip().startswith("#")
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what is wrong, what is to be set, what may be started; the exit status is 1 if
    something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=CODE_ROOT / "cluster.yaml")
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

"""`cluster.yaml`: Ray's own schema, and what that does not look at."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from valle.jobs.check_cluster import main, placeholders, problems
from valle.platform.autoscaler import parse_limits
from valle.platform.cluster import CODE_ROOT

FILE = CODE_ROOT / "cluster.yaml"
Configuration = dict[str, Any]


@pytest.fixture
def text() -> str:
    return FILE.read_text()


@pytest.fixture
def configuration(text: str) -> Configuration:
    loaded: Configuration = yaml.safe_load(text)
    return loaded


@pytest.fixture
def nodes(configuration: Configuration) -> dict[str, Any]:
    types: dict[str, Any] = configuration["available_node_types"]
    return types


def test_problems_finds_none_in_cluster_yaml(configuration: Configuration) -> None:
    assert list(problems(configuration)) == []


def with_value(configuration: Configuration, key: str, value: Any) -> Configuration:
    """With `a.b.c` set, or taken out (None)."""
    *path, last = key.split(".")
    place = configuration
    for part in path:
        place[part] = dict(place[part])  # anchors share their dictionaries
        place = place[part]
    place[last] = value
    if value is None:
        del place[last]
    return configuration


TRAIN = "available_node_types.train.node_config"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("head_node_type", "haed", "Ray refuses it: `head_node_type` must be one of"),
        ("idle_timeout", 5, "Ray refuses it: .*idle_timeout"),
        ("available_node_types.train.max_worker", 5, "Ray refuses it: .*max_worker"),
        ("available_node_types.train.min_workers", 30, "Ray refuses it: "),
        (f"{TRAIN}.MetadataOption", {}, 'train: Unknown parameter in input: "MetadataOption"'),
        (
            f"{TRAIN}.MetadataOptions", {"HttpToken": "required"},
            'train: Unknown parameter in MetadataOptions: "HttpToken"',
        ),
        (f"{TRAIN}.MetadataOptions.HttpTokens", "optional", "train: MetadataOptions.HttpTokens"),
        (f"{TRAIN}.IamInstanceProfile", None, "train: IamInstanceProfile: missing"),
        (f"{TRAIN}.SecurityGroupIds", None, "train: SecurityGroupIds: missing"),
        ("provider.security_group", {"GroupName": "x"}, "provider.security_group: Ray adds SSH"),
        ("setup_commands", ["true"], "head_start_ray_commands: without RAY_AUTH_MODE=token"),
        (
            "setup_commands", ["cat > ~/valle.env <<'END'\n# export RAY_AUTH_MODE=token\nEND"],
            "head_start_ray_commands: without RAY_AUTH_MODE=token",
        ),
        (
            "worker_start_ray_commands", ["ray start --address=$RAY_HEAD_IP:6379"],
            "worker_start_ray_commands: without RAY_AUTH_MODE=token",
        ),
        ("file_mounts", {"/home/ubuntu/pins/x": "x"}, "file_mounts: Ray's token"),
        (
            "head_start_ray_commands",
            [". ~/valle.env; ulimit -n 65536; ray start --head --dashboard-host=0.0.0.0"],
            "head_start_ray_commands: --dashboard-host=0.0.0.0 takes jobs",
        ),
    ],
)  # fmt: skip
def test_problems_names_each_fault(
    configuration: Configuration, key: str, value: Any, message: str
) -> None:
    errors = list(problems(with_value(configuration, key, value)))
    assert errors and re.search(message, errors[0]), errors


def test_main_lists_placeholders_and_node_types(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str
) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert "SecurityGroupIds: [sg-EDIT]" in printed and "MLFLOW_TRACKING_URI" in printed
    assert "may start: 4 x train-spot, 48 CPUs, 4 GPUs" in printed
    assert placeholders(text.replace("EDIT", "set")) == []
    (tmp_path / "open.yaml").write_text(text.replace("SecurityGroupIds: [sg-EDIT]", ""))
    assert main([str(tmp_path / "open.yaml")]) == 1
    assert "wrong: head: SecurityGroupIds: missing" in capsys.readouterr().err


def test_nodes_are_closed_and_carry_no_keys(text: str, nodes: dict[str, Any]) -> None:
    for node in nodes.values():
        config = node["node_config"]
        assert config["IamInstanceProfile"]["Arn"].endswith(("/valle-head", "/valle-worker"))
        assert config["MetadataOptions"] == {
            "HttpEndpoint": "enabled",
            "HttpTokens": "required",
            "HttpPutResponseHopLimit": 1,
        }
        assert config["SecurityGroupIds"] and not {"KeyName", "UserData"} & config.keys()
        assert all(disk["Ebs"]["Encrypted"] for disk in config["BlockDeviceMappings"])
    profiles = {
        name: node["node_config"]["IamInstanceProfile"]["Arn"] for name, node in nodes.items()
    }
    assert [name for name, arn in profiles.items() if "valle-head" in arn] == ["head"]
    assert not re.search(
        r"AKIA|ASIA|aws_(secret_)?access_key|PRIVATE KEY|ssh_private_key", text, re.I
    )
    assert "0.0.0.0" not in text


def test_node_types_scale_from_zero_beside_an_idle_head(
    configuration: Configuration, nodes: dict[str, Any]
) -> None:
    assert nodes["head"]["resources"] == {"CPU": 0}
    workers = {name: node for name, node in nodes.items() if name != "head"}
    for node in workers.values():
        assert node["min_workers"] == 0 < node["max_workers"] <= configuration["max_workers"]
    assert 0 < configuration["idle_timeout_minutes"] <= 60
    for role in ("train", "serve"):
        markets = {
            "spot" if "InstanceMarketOptions" in node["node_config"] else "on demand"
            for node in workers.values()
            if node["labels"]["role"] == role and node["resources"]["GPU"] > 0
        }
        assert markets == {"spot", "on demand"}
    for name, node in workers.items():
        assert ("InstanceMarketOptions" in node["node_config"]) is name.endswith("-spot")
    for role in ("train", "serve"):
        assert workers[f"{role}-spot"]["priority"] > workers[role]["priority"]
    limits = parse_limits(configuration)  # what `accelerator: auto` sees of it
    assert limits.max_nodes == configuration["max_workers"] and limits.node_types
    assert {node.name for node in limits.node_types if node.gpus} == {
        "train",
        "train-spot",
        "serve",
        "serve-spot",
    }


def test_setup_installs_the_versions_of_the_repository(configuration: Configuration) -> None:
    mounts = configuration["file_mounts"]
    for name in ("pyproject.toml", "constraints.txt"):
        assert mounts[f"/home/ubuntu/pins/{name}"] == name and (CODE_ROOT / name).is_file()
    install = [line for line in configuration["setup_commands"] if "uv pip install" in line]
    assert len(install) == 1 and install[0].count("-c constraints.txt") == 2
    assert (
        "--python 3.11" in install[0]
        and "Python 3.11" in (CODE_ROOT / "constraints.txt").read_text()
    )
    extras = set(re.findall(r"--extra (\w+)", install[0]))
    assert extras == {"train", "serve", "evaluate"}
    # no version is written here a second time, but for the installer's own
    assert not re.findall(r"\b(\w+)==", "\n".join(configuration["setup_commands"]))
    assert "https://astral.sh/uv/0.13.8/install.sh" in install[0]


def test_start_commands_require_ray_s_token_on_every_node(configuration: Configuration) -> None:
    assert configuration["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    (environment,) = (
        line for line in configuration["setup_commands"] if "cat > ~/valle.env" in line
    )
    assert "export RAY_AUTH_MODE=token" in environment
    assert "RAY_AUTH_TOKEN_PATH=$HOME/.ray/auth_token" in environment
    for place in ("head", "worker"):
        commands = configuration[f"{place}_start_ray_commands"]
        assert commands and all(line.startswith(". ~/valle.env; ") for line in commands)
        assert "--temp-dir=/mnt/nvme/ray" in commands[-1]
    assert "--dashboard-host=127.0.0.1" in configuration["head_start_ray_commands"][-1]


def test_setup_writes_the_environment_that_bash_reads(
    configuration: Configuration, tmp_path: Path
) -> None:
    """Through Ray's own quoting of commands, and a second time as `ray up` does it."""
    from ray.autoscaler._private.command_runner import _with_interactive

    (tmp_path / ".bashrc").touch()
    lines = [line for line in configuration["setup_commands"] if "valle.env" in line][:2]
    for line in lines * 2:
        shell = " ".join(_with_interactive(line))
        subprocess.run(
            shell,
            shell=True,
            check=True,
            env=os.environ | {"HOME": str(tmp_path)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )
    assert (tmp_path / ".bashrc").read_text() == ". ~/valle.env\n"
    output = subprocess.run(
        ["bash", "-c", '. ~/valle.env; echo "$VALLE_CACHE $RAY_AUTH_MODE $RAY_AUTH_TOKEN_PATH"'],
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
        check=True,
        text=True,
        capture_output=True,
    )
    assert output.stdout == f"/mnt/nvme/valle token {tmp_path}/.ray/auth_token\n"


FREE, MOUNTED, HELD = "{disk}\n", "{disk} /data ext4\n", "{disk}\nvg-data\n"


@pytest.mark.parametrize(
    ("disks", "mount_points", "expected"),
    [
        ([], [], []),
        ([FREE], [], ["mkfs.ext4 -q /dev/nvme1n1", "mount /dev/nvme1n1 /mnt/nvme"]),
        (
            [FREE, FREE], [],
            [
                "mdadm --create /dev/md0 --run --level=0 --raid-devices=2 "
                "/dev/nvme1n1 /dev/nvme2n1",
                "mkfs.ext4 -q /dev/md0", "mount /dev/md0 /mnt/nvme",
            ],
        ),
        ([FREE], ["/opt/dlami/nvme"], ["mount --bind /opt/dlami/nvme /mnt/nvme"]),
        ([FREE], ["/mnt/nvme"], []),
        ([MOUNTED, FREE], [], ["mkfs.ext4 -q /dev/nvme2n1", "mount /dev/nvme2n1 /mnt/nvme"]),
        ([HELD, HELD], [], []),
    ],
)  # fmt: skip
def test_initialization_joins_the_disks_of_a_node(
    configuration: Configuration,
    tmp_path: Path,
    disks: list[str],
    mount_points: list[str],
    expected: list[str],
) -> None:
    """The commands, run with stand-ins for those that need root and real disks."""
    templates = {f"/dev/nvme{number}n1": disk for number, disk in enumerate(disks, 1)}
    disk_lines = "".join(f"{name} Amazon EC2 NVMe Instance Storage\n" for name in templates)
    detail = "".join(
        f'*" {name}") printf "{template.format(disk=name.rpartition("/")[2])}";;\n'
        for name, template in templates.items()
    )
    programs = {
        "sudo": f'echo "$*" >> {tmp_path}/commands',
        "cloud-init": f'echo "cloud-init $*" >> {tmp_path}/waits; exit 2',
        "systemctl": f'echo "systemctl $*" >> {tmp_path}/waits; exit 1',
        "lsblk": (
            f"test -s {tmp_path}/waits || exit 9\n"
            f'case "$*" in\n{detail}*) printf \'/dev/nvme0n1 Amazon Elastic Block Store\n'
            f"{disk_lines}';; esac"
        ),
        "mountpoint": f'case " {" ".join(mount_points)} " in *" $2 "*) exit 0;; *) exit 1;; esac',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (command,) = configuration["initialization_commands"]
    subprocess.run(
        ["bash", "-c", command], check=True, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    )
    assert (tmp_path / "waits").read_text().splitlines() == [
        "cloud-init status --wait",
        "systemctl is-system-running --wait",
    ]
    commands = (tmp_path / "commands").read_text().splitlines()
    assert commands[0] == "mkdir -p /mnt/nvme"
    assert commands[1:-2] == expected
    assert commands[-2:] == [
        "mkdir -p /mnt/nvme/valle /mnt/nvme/ray",
        "chown -R ubuntu:ubuntu /mnt/nvme/valle /mnt/nvme/ray",
    ]


@pytest.mark.parametrize(
    ("vendor", "torch_works", "status"),
    [("0x10de", True, 0), ("0x10de", False, 1), ("0x1d0f", False, 0), (None, False, 0)],
)
def test_setup_fails_on_a_node_whose_gpu_torch_cannot_use(
    configuration: Configuration, tmp_path: Path, vendor: str | None, torch_works: bool, status: int
) -> None:
    """Whether or not it has NVIDIA's driver; there is none where this runs in CI."""
    command = configuration["setup_commands"][-1]
    assert "torch.zeros(1).cuda()" in command and command.count("/sys/bus/pci") == 1
    device = tmp_path / "bus" / "pci" / "devices" / "0000:00:1e.0"
    device.mkdir(parents=True)
    if vendor:
        (device / "vendor").write_text(f"{vendor}\n")
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\nexit {0 if torch_works else 1}\n")
    python.chmod(0o755)
    process = subprocess.run(
        ["bash", "-c", command.replace("/sys/bus/pci", f"{tmp_path}/bus/pci")],
        check=False,
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
    )
    assert process.returncode == status


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """An AWS of one's own, with what `cluster.yaml` asks to be made by hand; the values that go
    in for its placeholders."""
    import boto3
    from moto import mock_aws

    monkeypatch.setenv("HOME", str(tmp_path))  # Ray keeps the SSH key that it makes in ~/.ssh
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with mock_aws():
        ec2, iam = boto3.client("ec2", "us-west-2"), boto3.client("iam", "us-west-2")
        vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
        subnets = {}
        for number, zone in enumerate("ab"):
            subnet = ec2.create_subnet(
                VpcId=vpc, CidrBlock=f"10.0.{number}.0/24", AvailabilityZone=f"us-west-2{zone}"
            )["Subnet"]["SubnetId"]
            ec2.modify_subnet_attribute(SubnetId=subnet, MapPublicIpOnLaunch={"Value": True})
            subnets[f"subnet-EDIT-{zone}"] = subnet
        group = ec2.create_security_group(VpcId=vpc, GroupName="valle", Description="closed")
        for name in ("valle-head", "valle-worker"):
            iam.create_instance_profile(InstanceProfileName=name)
        yield {
            "sg-EDIT": group["GroupId"],
            **subnets,
            "iam::EDIT": "iam::123456789012",
        }


@pytest.mark.slow
def test_ray_up_starts_each_node_type_and_opens_no_port(text: str, aws: dict[str, str]) -> None:
    """As far as `ray up` goes without machines: its bootstrap, and a node of each kind."""
    import boto3
    from ray.autoscaler._private.commands import _bootstrap_config
    from ray.autoscaler._private.providers import _get_node_provider

    for placeholder, value in aws.items():
        assert placeholder in text
        text = text.replace(placeholder, value)
    configuration = yaml.safe_load(text)
    resources = {
        name: node["resources"] for name, node in configuration["available_node_types"].items()
    }
    for node in configuration["available_node_types"].values():
        node["resources"] = {}  # to be looked up by Ray, in EC2's list of instance types
    bootstrapped = _bootstrap_config(configuration, no_config_cache=True)
    nodes = bootstrapped["available_node_types"]
    provider = _get_node_provider(bootstrapped["provider"], "valle", use_cache=False)
    for name, node in nodes.items():
        if name != "head":
            assert resources[name].items() <= node["resources"].items()
        provider.create_node(node["node_config"], {"ray-user-node-type": name}, 1)
    ec2 = boto3.client("ec2", "us-west-2")
    instances = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
    assert len(instances) == len(nodes) == 6
    assert sum(i.get("InstanceLifecycle") == "spot" for i in instances) == 3
    for node in nodes.values():
        assert set(node["node_config"]["SubnetIds"]) == {
            aws["subnet-EDIT-a"],
            aws["subnet-EDIT-b"],
        }, "a zone that is full has another beside it"
    for instance in instances:
        assert instance["MetadataOptions"]["HttpTokens"] == "required"
        assert [g["GroupId"] for g in instance["SecurityGroups"]] == [aws["sg-EDIT"]]
    rules = [g["IpPermissions"] for g in ec2.describe_security_groups()["SecurityGroups"]]
    assert not any(rules), "Ray has added no rule of its own, SSH from anywhere for instance"

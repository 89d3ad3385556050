"""The layout of the repository: `platform/`, the links, the rules of import."""

import ast
import importlib
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("platform", "model", "jobs", "serve")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
MODULES = [
    f"valle.{path.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.')}"
    for path in FILES
    if path.name != "__init__.py"
]


def test_links_resolve() -> None:
    for folder in FOLDERS:
        link = ROOT / "valle" / folder
        assert link.is_symlink() and not Path(link.readlink()).is_absolute()
        assert link.resolve() == ROOT / folder


def test_platform_does_not_hide_the_standard_module() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert platform.system()
    code = "import platform; assert platform.system(); import valle.platform.settings"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_imports(module: str) -> None:
    importlib.import_module(module)


def test_modules_import_without_the_links(tmp_path: Path) -> None:
    """A zip from a web page turns links into text files; `__path__` finds the folders then."""
    (tmp_path / "valle").mkdir()
    (tmp_path / "valle" / "__init__.py").write_text((ROOT / "valle/__init__.py").read_text())
    (tmp_path / "model").mkdir()
    for name in ("__init__.py", "tokens.py"):
        (tmp_path / "model" / name).write_text((ROOT / "model" / name).read_text())
    code = "import valle.model.tokens as t; print(t.__file__)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert str(tmp_path) in run.stdout


def _imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere, `from valle.x import y` as valle.x.y."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


DEPLOYMENT_MODULES = tuple(
    f"valle.serve.deployments.{path.stem}"
    for path in sorted((ROOT / "serve/deployments").glob("*.py"))
    if path.stem not in ("__init__", "interface")
)
"""What only the application and the deployments themselves may import."""

BANNED = {
    "platform": ("valle.jobs", "valle.serve"),
    "model": (
        "ray", "mlflow", "deepspeed", "os.environ", "os.getenv", "argparse", "valle.platform",
        "valle.jobs", "valle.serve",
    ),
    "serve": ("valle.jobs",),
    "serve/deployments": ("valle.serve.web",),
    "serve/web": ("ray", *DEPLOYMENT_MODULES),
    "serve/engine": (
        "ray", "fastapi", "starlette", "valle.platform", "valle.serve.web",
        "valle.serve.deployments",
    ),
}  # fmt: skip
"""Arrows of import run down only: jobs -> serve -> platform -> model."""

ALLOWED = {
    "serve/web/validate_config.py": (
        "ray.serve.schema.ServeDeploySchema", "ray.serve.config.ProxyLocation",
    )
}  # fmt: skip
"""Exceptions: the check of a Serve configuration reads Serve's schema."""


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_run_down_only(path: Path) -> None:
    folder = path.relative_to(ROOT).parent.as_posix() + "/"
    for room, banned in BANNED.items():
        if folder.startswith(room + "/"):
            for module in _imports(path):
                wrong = [b for b in banned if module == b or module.startswith(f"{b}.")]
                name = path.relative_to(ROOT).as_posix()
                assert not wrong or module in ALLOWED.get(name, ()), f"{name} imports {module}"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "jobs" / "training").glob("*.py")), ids=lambda p: p.name
)
def test_training_loop_imports_no_ray(path: Path) -> None:
    """Ray Train has one adapter, in two files; the loop and all that it trains run in plain
    processes."""
    if path.name not in ("ray_train.py", "run_folder.py"):
        assert not [m for m in _imports(path) if m.split(".")[0] == "ray"]
        assert "valle.jobs.training.ray_train" not in _imports(path)


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.py")), ids=lambda p: p.name)
def test_jobs_are_commands(path: Path) -> None:
    functions = {n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)}
    assert path.name == "__init__.py" or "main" in functions


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_is_named_after_a_standard_module(folder: str) -> None:
    """`python FILE` puts the file's folder on the path, where it would hide the module."""
    names = {path.stem for path in (ROOT / folder).rglob("*") if path.suffix in ("", ".py")}
    assert not names & set(sys.stdlib_module_names)


def test_settings_is_the_only_reader_of_the_environment() -> None:
    readers = ("platform/settings.py", "platform/cluster.py")
    for path in FILES:
        text = path.read_text()
        if path.relative_to(ROOT).as_posix() not in readers:
            assert "os.environ" not in text and "getenv" not in text, path
    assert "os.environ.get" not in (ROOT / "platform/cluster.py").read_text()


@pytest.mark.parametrize("folder", (*FOLDERS, "tests", "valle"))
def test_no_file_is_longer_than_400_lines(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path

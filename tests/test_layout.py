"""The `platform/` trap, the links, and the rules about who imports whom."""

import ast
import importlib
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("platform", "model", "jobs", "serve")
MODULES = sorted(
    f"valle.{path.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.')}"
    for folder in FOLDERS
    for path in (ROOT / folder).glob("*.py")
    if path.name != "__init__.py"
)


def test_links_resolve() -> None:
    for folder in FOLDERS:
        link = ROOT / "valle" / folder
        assert link.is_symlink() and not Path(link.readlink()).is_absolute()
        assert link.resolve() == ROOT / folder


def test_the_standard_library_keeps_its_platform_module() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert platform.system()
    code = "import platform; assert platform.system(); import valle.platform.settings"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_imports(module: str) -> None:
    importlib.import_module(module)


def test_modules_are_found_without_the_links(tmp_path: Path) -> None:
    """A zip from a web page turns links into text files; `__path__` finds the folders then."""
    (tmp_path / "valle").mkdir()
    (tmp_path / "valle" / "__init__.py").write_text((ROOT / "valle/__init__.py").read_text())
    (tmp_path / "model").mkdir()
    for name in ("__init__.py", "tokens.py"):
        (tmp_path / "model" / name).write_text((ROOT / "model" / name).read_text())
    code = "import valle.model.tokens as t; print(t.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert str(tmp_path) in found.stdout


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "model").glob("*.py")), ids=lambda p: p.name)
def test_model_is_pytorch_only(path: Path) -> None:
    banned = ("ray", "mlflow", "os", "deepspeed", "valle.platform", "valle.jobs", "valle.serve")
    for module in _imports(path):
        assert not any(module == b or module.startswith(f"{b}.") for b in banned), module


def test_settings_is_the_only_reader_of_the_environment() -> None:
    for folder in FOLDERS:
        for path in (ROOT / folder).glob("*.py"):
            text = path.read_text()
            if path.name not in ("settings.py", "cluster.py"):
                assert "os.environ" not in text and "getenv" not in text, path
    assert "os.environ.get" not in (ROOT / "platform/cluster.py").read_text()


def test_no_file_is_longer_than_400_lines() -> None:
    for folder in (*FOLDERS, "tests", "valle"):
        for path in (ROOT / folder).glob("*.py"):
            assert len(path.read_text().splitlines()) <= 400, path

"""The name plate: `platform/`, `model/`, `jobs/` and `serve/` as one package.

The four entries beside this file are relative links, so that type checkers, editors and Ray's
upload see plain packages. Where a delivery channel dropped the links (a zip from a web page, a
Windows checkout), the repository root on `__path__` finds the same folders.

`platform/` must never get an `__init__.py`: with the repository root on `sys.path` it would shadow
the standard library's `platform` and break torch and ray. See platform/README.md.
"""

from pathlib import Path

__path__.append(str(Path(__file__).resolve().parent.parent))

__version__ = "0.1.0"

"""The package `valle`: the folders `platform/`, `model/`, `jobs/` and `serve/` of the repository.

Four relative links in this folder make them plain packages for type checkers, editors and Ray's
upload. Delivery channels that drop links (a zip from a web page, a Windows checkout) leave the
repository root on `__path__`, where the same folders are found.

`platform/` must never have an `__init__.py`: with the repository root on `sys.path` it would hide
the standard library's `platform` and break torch and ray. See platform/README.md.
"""

from pathlib import Path

__path__.append(str(Path(__file__).resolve().parent.parent))

__version__ = "0.1.0"

"""Exports a published model as a bundle to ship: int8 weights, paths relative to `VALLE_HOME`.

`valle speak --model FOLDER` loads the bundle. The bundle in `release/nano` is the shipped one,
which is used while the registry has no champion.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from valle.jobs.recipes import parse_arguments
from valle.model import quantize
from valle.platform import checkpoint, registry, settings
from valle.platform.bundle import BUNDLE, REPORT, Bundle, read_bundle, verify, write_bundle
from valle.platform.recipe import location


@dataclass(frozen=True, kw_only=True)
class ExportRecipe:
    """Model, precision and destination of an export."""

    out: str = field(metadata=location())
    """Folder of the bundle. An earlier export is replaced as a whole; other files in it stay."""

    model: str = field(default=registry.CHAMPION, metadata=location())
    """`models:/valle@alias`, `models:/valle/3`, or a bundle's folder."""

    precision: str = "int8"
    """Precision of the stored weights: int8 (a quarter of the size) or fp32."""

    def __post_init__(self) -> None:
        if self.precision not in ("int8", "fp32"):
            raise ValueError(f"precision: {self.precision!r} is none of int8, fp32")


def export(recipe: ExportRecipe) -> Path:
    """Writes the bundle; returns its folder.

    The bundle is built beside `out`, loaded as a check, and renamed to `out`. Endpoints that serve
    the folder switch to the new bundle, as they do when an alias moves. Raises ValueError for an
    `out` that holds other files than an export, and the errors of `registry.resolve`.
    """
    source, out = registry.resolve(recipe.model), Path(recipe.out)
    _restore(out)
    _check_target(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    # beside `out`: a folder on another file system could not be renamed
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as name:
        folder = Path(name) / "bundle"
        _convert(source, folder, recipe.precision)
        _keep_other_files(out, folder)
        write_bundle(folder, _relative_bundle(source))
        registry.load_synthesizer(folder)  # a bundle that cannot be loaded is not exported
        verify(folder)
        _exchange(folder, out)
    return out


def _convert(source: Path, folder: Path, precision: str) -> None:
    """Writes the parts of a bundle to `folder`, all but `bundle.json`."""
    for kind in ("ar", "nar"):
        weights = checkpoint.load_weights(source / kind)
        metadata = checkpoint.read_metadata(source / kind)
        checkpoint.save(
            folder / kind,
            quantize.to_int8(weights) if precision == "int8" else weights,
            replace(metadata, recipe=relative_to_home(metadata.recipe)),
        )
    for part in (*CODEC_FILES, "report.md"):
        if (source / part).exists():
            (folder / part).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / part, folder / part)
    if (source / REPORT).exists():
        report = relative_to_home(json.loads((source / REPORT).read_text()))
        (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")


def _relative_bundle(source: Path) -> Bundle:
    bundle = read_bundle(source)
    return replace(bundle, ar=relative_to_home(bundle.ar), nar=relative_to_home(bundle.nar))


CODEC_FILES = ("codec/model.safetensors", "codec/config.json")
OF_A_BUNDLE = ("ar", "nar", "codec", BUNDLE, REPORT, "sample.wav", "sample.png")
"""What an export finds in the folder of an earlier one, beside documents."""


def _check_target(out: Path) -> None:
    """Raises ValueError for a folder that holds other files than an export."""
    if not out.exists() or (out / BUNDLE).is_file():
        return
    others = sorted(
        p.name for p in out.iterdir() if p.suffix != ".md" and p.name not in OF_A_BUNDLE
    )
    if others:
        raise ValueError(
            f"out: {out} holds other things than an export ({others[0]}), and an export replaces "
            "the folder; name a new one"
        )


def _keep_other_files(out: Path, folder: Path) -> None:
    """Files of `out` that are not part of a model, such as its card, stay."""
    replaced = {REPORT, "report.md", BUNDLE, "sample.wav", "sample.png", *CODEC_FILES}
    for path in sorted(out.rglob("*")) if out.exists() else ():
        name = path.relative_to(out)
        if path.is_file() and str(name) not in replaced and not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, folder / name)


def _exchange(folder: Path, out: Path) -> None:
    """Renames `folder` to `out`; a reader finds the old bundle, the new one, or for a moment none.

    Never a mixture: file systems rename a folder as a whole, but have no common call that exchanges
    two. An interrupted exchange is undone by the next export.
    """
    previous = _previous(out)
    if out.exists():
        out.rename(previous)
    try:
        folder.rename(out)
    except OSError:
        _restore(out)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _restore(out: Path) -> None:
    """Brings the earlier bundle back where an export was interrupted between its two renames."""
    previous = _previous(out)
    if previous.exists():
        if out.exists():
            shutil.rmtree(previous)
        else:
            previous.rename(out)


def _previous(out: Path) -> Path:
    return out.with_name(f".{out.name}.previous")


def relative_to_home(values: Any) -> Any:
    """Copies recipe values; paths below `VALLE_HOME` become relative to it, as in a recipe."""
    if isinstance(values, dict):
        return {key: relative_to_home(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [relative_to_home(value) for value in values]
    if isinstance(values, str):
        return values.removeprefix("file://").removeprefix(f"{settings.read().home}/")
    return values


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `valle export --recipe nano out=release/nano`."""
    recipe = parse_arguments(argv, "export", ExportRecipe, __doc__ or "")
    try:
        out = export(recipe)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    size = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    print(f"{out}: {size / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    main()

"""Exports a published model as a bundle to ship: int8 weights, paths relative to `VALLE_HOME`.

`valle speak --model FOLDER` loads the bundle. The bundle in `release/nano` is the shipped one,
which is published into an empty registry on first use.
"""

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from valle.jobs.recipes import parse_arguments
from valle.model import quantize
from valle.platform import checkpoint, registry, settings
from valle.platform.recipe import location


@dataclass(frozen=True, kw_only=True)
class ExportRecipe:
    """Model, precision and destination of an export."""

    out: str = field(metadata=location())
    """Folder of the bundle; files of an earlier export are replaced, other files stay."""

    model: str = field(default=registry.CHAMPION, metadata=location())
    """`models:/valle@alias`, `models:/valle/3`, or a bundle's folder."""

    precision: str = "int8"
    """Precision of the stored weights: int8 (a quarter of the size) or fp32."""

    def __post_init__(self) -> None:
        if self.precision not in ("int8", "fp32"):
            raise ValueError(f"precision: {self.precision!r} is none of int8, fp32")


def export(recipe: ExportRecipe) -> Path:
    """Writes the bundle; returns its folder.

    The bundle is built in a temporary folder; `out` is unchanged when it cannot be loaded.
    """
    source, out = registry.resolve(recipe.model), Path(recipe.out)
    with tempfile.TemporaryDirectory() as name:
        bundle_folder = Path(name) / "bundle"
        for kind in ("ar", "nar"):
            weights = checkpoint.load_weights(source / kind)
            metadata = checkpoint.read_metadata(source / kind)
            checkpoint.save(
                bundle_folder / kind,
                quantize.to_int8(weights) if recipe.precision == "int8" else weights,
                replace(metadata, recipe=relative_to_home(metadata.recipe)),
            )
        bundle = relative_to_home(asdict(registry.read_bundle(source)))
        (bundle_folder / "bundle.json").write_text(json.dumps(bundle, indent=2) + "\n")
        for part in ("codec/model.safetensors", "codec/config.json", "report.md"):
            if (source / part).exists():
                (bundle_folder / part).parent.mkdir(exist_ok=True)
                shutil.copyfile(source / part, bundle_folder / part)
        if (source / "report.json").exists():
            report = relative_to_home(json.loads((source / "report.json").read_text()))
            (bundle_folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        registry.load_synthesizer(bundle_folder)  # a bundle that cannot be loaded is not exported
        for part in ("report.json", "report.md"):  # of the earlier export
            (out / part).unlink(missing_ok=True)
        shutil.copytree(bundle_folder, out, dirs_exist_ok=True)
    return out


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
    out = export(recipe)
    size = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    print(f"{out}: {size / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    main()

"""Publishes an AR and a NAR checkpoint with their codec as one version in the model registry."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from valle.model.valle import Synthesis
from valle.platform import audio, recipe, registry, storage, tracking


@dataclass(frozen=True, kw_only=True)
class PublishRecipe:
    """What to publish, and the sample that goes with it."""

    ar: str
    """Checkpoint, or the run's folder (its last checkpoint is taken)."""

    nar: str
    """Checkpoint, or the run's folder (its last checkpoint is taken)."""

    sample_prompt: str
    """Recording whose voice speaks the sample."""

    codec: str = "nano"
    """The codec both were trained with."""

    alias: str = "champion"
    """Registry alias that will point at the new version."""

    sample_text: str = "The voice you are hearing was made by a small model."
    """What the sample says."""

    sample_seconds: float = 8.0
    """Length limit of the sample."""


def last_checkpoint(uri: str) -> str:
    """`uri` itself when it is a checkpoint, else the newest `step_*` folder in it."""
    if storage.exists(storage.join(uri, "model.safetensors")):
        return uri
    steps = sorted(
        path.split("/")[0]
        for path in storage.list_files(uri, ("model.safetensors",))
        if path.startswith("step_")
    )
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {uri}: train first")
    return storage.join(uri, steps[-1])


def publish(chosen: PublishRecipe) -> int:
    """Packs, speaks the sample, registers; returns the version."""
    ar, nar = (last_checkpoint(storage.absolute(uri)) for uri in (chosen.ar, chosen.nar))
    prompt = audio.read(storage.read_bytes(chosen.sample_prompt), max_seconds=60)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "bundle"
        registry.pack(ar, nar, chosen.codec, folder)
        how = replace(Synthesis(), max_seconds=chosen.sample_seconds)
        spoken = registry.load_voice(folder).speak(chosen.sample_text, prompt, how)
        (folder / "sample.wav").write_bytes(audio.wav_bytes(spoken.wave))
        (folder / "sample.png").write_bytes(tracking.spectrogram(spoken.wave, chosen.sample_text))
        return registry.publish(folder, chosen.alias, {"ar": ar, "nar": nar})


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `python -m valle.jobs.publish --recipe demo`."""
    chosen = recipe.parse_arguments(argv, "publish", PublishRecipe, __doc__ or "")
    version = publish(chosen)
    print(f"published {registry.NAME} version {version}, alias {chosen.alias}")


if __name__ == "__main__":
    main()

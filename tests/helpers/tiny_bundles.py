"""Checkpoints, bundles and registry entries of untrained models that generate noise."""

from pathlib import Path

from helpers.recordings import speech
from helpers.tiny_models import tiny_ar, tiny_nar
from valle.jobs.publish import PublishRecipe
from valle.model.codec.interface import CodecIdentity
from valle.model.tokens import EOS
from valle.platform import audio, checkpoint, packing

EOS_BIAS = 4.2
"""Bias of the AR model's EOS logit: speech of some fifteen frames. -1e9: no EOS at all."""


def save_checkpoints(
    folders: dict[str, Path], codec: CodecIdentity, eos_bias: float = EOS_BIAS, seed: int = 0
) -> None:
    """Writes a checkpoint of each kind (`ar`, `nar`) to its folder."""
    for kind, folder in folders.items():
        model = tiny_ar(seed) if kind == "ar" else tiny_nar(seed)
        if kind == "ar":
            model.head.bias.data[EOS] = eos_bias
        metadata = checkpoint.new_metadata(model.config, codec, "test", {})
        checkpoint.save(folder, model.state_dict(), metadata)


def pack_bundle(folder: Path, codec_folder: Path, codec: CodecIdentity) -> Path:
    """A bundle of untrained models and a codec, without a registry."""
    checkpoints = {kind: folder / "checkpoints" / kind for kind in ("ar", "nar")}
    save_checkpoints(checkpoints, codec)
    bundle = folder / "bundle"
    bundle.mkdir()
    packing.pack(str(checkpoints["ar"]), str(checkpoints["nar"]), str(codec_folder), bundle)
    return bundle


def write_publish_recipe(
    home: Path, codec_folder: Path, codec: CodecIdentity, eos_bias: float = EOS_BIAS
) -> PublishRecipe:
    """A recipe for untrained checkpoints and the voice `ann`, which it writes to `VALLE_HOME`."""
    for step in (5, 20):
        folders = {kind: home / f"runs/test-{kind}/step_{step:08d}" for kind in ("ar", "nar")}
        save_checkpoints(folders, codec, eos_bias)
    voice = home / "voices/ann.wav"
    voice.parent.mkdir(exist_ok=True)
    voice.write_bytes(audio.wav_bytes(speech(1.5)))
    return PublishRecipe(
        ar="runs/test-ar",
        nar="runs/test-nar",
        codec=str(codec_folder),
        sample_prompt="voices/ann.wav",
        sample_seconds=1.0,
        force="untrained models, for tests",
    )

"""Checkpoints and bundles of untrained models that generate noise."""

from pathlib import Path

from helpers.tiny_models import TINY, tiny_ar, tiny_nar
from valle.model.codec.interface import CodecIdentity
from valle.model.tokens import EOS
from valle.platform import checkpoint, registry

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
        metadata = checkpoint.new_metadata(kind, TINY, codec, "test", {})
        checkpoint.save(folder, model.state_dict(), metadata)


def pack_bundle(folder: Path, codec_folder: Path, codec: CodecIdentity) -> Path:
    """A bundle of untrained models and a codec, without a registry."""
    checkpoints = {kind: folder / "checkpoints" / kind for kind in ("ar", "nar")}
    save_checkpoints(checkpoints, codec)
    bundle = folder / "bundle"
    bundle.mkdir()
    registry.pack(str(checkpoints["ar"]), str(checkpoints["nar"]), str(codec_folder), bundle)
    return bundle

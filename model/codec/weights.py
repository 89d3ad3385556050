"""Weights of codecs: their hash, and the files of nano 2's quantiser.

A quantiser's folder holds safetensors in half precision and its sizes as JSON.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from valle.model.codec.quantizer import Quantizer, QuantizerConfig

_TRAINING_ONLY = ("embed_avg", "cluster_size", "inited")
"""Suffixes of the codebooks' moving averages, which only training needs."""


def weights_hash(weights: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes, types and values, independent of the file format."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.ndim else b"")
    return digest.hexdigest()


def inference_weights(quantizer: Quantizer) -> dict[str, Tensor]:
    """The weights that encoding and decoding read; the codec's identity is their hash."""
    return {
        name: value
        for name, value in quantizer.state_dict().items()
        if not name.endswith(_TRAINING_ONLY)
    }


def save_quantizer(quantizer: Quantizer, folder: Path) -> None:
    """Writes `model.safetensors` and `config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: value.half().contiguous() for name, value in inference_weights(quantizer).items()
    }
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(asdict(quantizer.config), indent=2) + "\n")


def load_quantizer(folder: Path) -> Quantizer:
    """The quantiser in `folder`, in float32 and evaluation mode.

    Raises FileNotFoundError or ValueError if the folder holds none.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"codec: no config.json in {folder}; give a codec's folder")
    quantizer = Quantizer(QuantizerConfig(**json.loads((folder / "config.json").read_text())))
    weights = {
        name: value.float() for name, value in load_file(folder / "model.safetensors").items()
    }
    missing, unexpected = quantizer.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not name.endswith(_TRAINING_ONLY)]
    if missing or unexpected:
        raise ValueError(f"codec weights do not fit: missing {missing}, unexpected {unexpected}")
    for book in quantizer.codebooks():
        book.inited.fill_(1)
        # averages as of one vector per entry, from which training may continue
        book.embed_avg.copy_(book.embed)
        book.cluster_size.fill_(1)
    return quantizer.eval().requires_grad_(False)

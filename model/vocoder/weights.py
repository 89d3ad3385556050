"""Reads the vocoder's weights, one safetensors file in the repository."""

from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file
from torch import Tensor

import valle

WEIGHTS_FILE: Final = (
    Path(valle.__file__).resolve().parent.parent / "release/nano2/vocoder/model.safetensors"
)
_SCALE: Final = ".scale"


def load_weights(network: str, path: Path = WEIGHTS_FILE) -> dict[str, Tensor]:
    """Float32 weights of `network` (`fargan` or `bandwidth`), named as in the module.

    A matrix stored as int8 `[rows, columns]` has a tensor `NAME.scale` `[rows]`, the factors of its
    rows. Raises FileNotFoundError, or ValueError if the file has no such network.
    """
    if not path.is_file():
        raise FileNotFoundError(f"vocoder: no weights at {path}; they are part of the repository")
    prefix = network + "."
    stored = {
        name.removeprefix(prefix): value
        for name, value in load_file(path).items()
        if name.startswith(prefix)
    }
    if not stored:
        raise ValueError(f"vocoder: {path} holds no network named {network}")
    weights = {}
    for name, value in stored.items():
        if name.endswith(_SCALE):
            continue
        weights[name] = value.float()
        if value.dtype == torch.int8:
            weights[name] *= stored[name + _SCALE][:, None]
    return weights

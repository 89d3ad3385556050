"""Compares the header of a safetensors file with the model that the metadata describes.

The metadata states the size of the model to build. Forged metadata must not make this process
allocate memory. So the names and shapes in the file's header, which is small, are compared first.
"""

import json
import struct
from pathlib import Path

import torch

from valle.model.ar import AR
from valle.model.config import ARConfig, NARConfig
from valle.model.nar import NAR
from valle.model.quantize import SCALE

MAX_HEADER_BYTES = 16_000_000
"""Of a header, a hundred times those of the largest preset."""

DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1,
               "U8": 1, "BOOL": 1}  # fmt: skip


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor by name, as in the loaded weights, which have no int8 scales.

    Raises ValueError for a file that is no safetensors file, or whose tensors do not fill it.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"{path} is no safetensors file: its header has {length} bytes")
        try:
            header = json.loads(file.read(length))
            tensors = {k: v for k, v in header.items() if k != "__metadata__"}
            shapes = {k: tuple(map(int, v["shape"])) for k, v in tensors.items()}
            stored = sum(DTYPE_BYTES[v["dtype"]] * _product(shapes[k]) for k, v in tensors.items())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is no safetensors file of weights: {error!r}") from error
    if stored != size - 8 - length:
        raise ValueError(f"{path} holds {size - 8 - length} bytes of weights, expected {stored}")
    return {k: v for k, v in shapes.items() if not _is_scale(k, tensors)}


def check_shapes(path: Path, config: ARConfig | NARConfig) -> None:
    """Raises ValueError unless the file at `path` holds the weights of a model of `config`.

    Allocates nothing of the model's size.
    """
    found = read_shapes(path)
    # before the model is built, even without memory: each layer costs time
    if config.n_layers > len(found) or config.n_codebooks > len(found):
        raise ValueError(
            f"{path} holds {len(found)} tensors, too few for {config.n_layers} layers and "
            f"{config.n_codebooks} codebooks"
        )
    with torch.device("meta"):
        model = AR(config) if isinstance(config, ARConfig) else NAR(config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if found == expected:
        return
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{path}: {name} has the shape {found.get(name, 'none')}, expected "
                f"{expected.get(name, 'none')}"
            )


def _product(shape: tuple[int, ...]) -> int:
    if any(n < 0 for n in shape):
        raise ValueError(f"a shape of {shape}")
    product = 1
    for n in shape:
        product *= n
    return product


def _is_scale(name: str, tensors: dict[str, dict[str, object]]) -> bool:
    matrix = tensors.get(name.removesuffix(SCALE))
    return name.endswith(SCALE) and matrix is not None and matrix.get("dtype") == "I8"

"""The checkpoint format, and the only code that reads or writes it.

    model.safetensors   weights of one model; shipped ones in int8 with scales (quantize.py)
    config.json         kind, architecture, recipe, code version, codec, phoneme inventory
    metrics.json        what validation said of it
    state/              what a resumed run needs besides: TrainState and optimizer

Weights are safetensors and are never unpickled. The optimizer of the `ddp` backend is safetensors
too; DeepSpeed keeps its own shards in `state/deepspeed`, which only the same run reads back.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import dacite
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from valle.model.ar import AR
from valle.model.codec.interface import CodecIdentity
from valle.model.config import Kind, ModelConfig
from valle.model.nar import NAR
from valle.model.quantize import from_int8
from valle.model.text import INVENTORY
from valle.platform import storage

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
METRICS = "metrics.json"
STATE = "state"
FORMAT = 2
"""In 1, prompts of the NAR model saw all there is: its weights mean something else in 2, where a
prompt sees only itself. AR models are the same in both."""

WORD_ERROR_RATE = "validation/wer"
"""Name of the metric that decides which checkpoint of a run is the best."""


@dataclass(frozen=True)
class TrainState:
    """State of a training run: all that a resumed run needs besides weights and optimizer."""

    step: int = 0
    """Optimizer steps taken."""

    epoch: int = 0
    """Pass over the data; the batch plan is a function of it."""

    batch: int = 0
    """Batches of this epoch that each worker has used."""

    averages: dict[str, float] = field(default_factory=dict)
    """Running averages of the training metrics; empty where single steps are logged."""

    rng: dict[str, str] = field(default_factory=dict)
    """State of rank 0's torch generators at a checkpoint (`jobs/training/rng.py`)."""


@dataclass(frozen=True, kw_only=True)
class CheckpointMetadata:
    """`config.json`: everything about a checkpoint but its numbers."""

    kind: Kind
    model: ModelConfig
    codec: CodecIdentity
    inventory: list[str]
    """Phoneme symbols by id."""
    code_version: str
    """Of the code that trained it."""
    recipe: dict[str, Any]
    """The resolved recipe of the run."""
    format: int = 1
    """What the weights mean; see `FORMAT`."""


@dataclass(frozen=True, kw_only=True)
class CodecCheckpointMetadata:
    """`config.json` of a checkpoint of a codec in training."""

    kind: Literal["encodec", "quantizer"]
    model: dict[str, Any]
    """Sizes of the network."""
    code_version: str
    """Version of the code that trained it."""
    recipe: dict[str, Any]
    """The resolved recipe of the run."""
    format: int = 1


def new_metadata(
    kind: Kind, model: ModelConfig, codec: CodecIdentity, code_version: str, recipe: dict[str, Any]
) -> CheckpointMetadata:
    """Metadata with this code's phoneme inventory."""
    return CheckpointMetadata(
        kind=kind, model=model, codec=codec, inventory=list(INVENTORY),
        code_version=code_version, recipe=recipe, format=FORMAT,
    )  # fmt: skip


def build_model(kind: Kind, config: ModelConfig) -> AR | NAR:
    """A fresh model."""
    return AR(config) if kind == "ar" else NAR(config)


def save(
    folder: Path,
    weights: Mapping[str, Tensor],
    metadata: CheckpointMetadata | CodecCheckpointMetadata,
) -> None:
    """Writes weights and metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(asdict(metadata), indent=2) + "\n")


def read_metadata(folder: Path) -> CheckpointMetadata:
    """The metadata of a checkpoint. Raises FileNotFoundError or ValueError."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint in {folder}: {CONFIG} is missing")
    try:
        metadata = dacite.from_dict(CheckpointMetadata, json.loads(path.read_text()), _STRICT)
    except (json.JSONDecodeError, dacite.DaciteError) as error:
        raise ValueError(f"{path} is not a checkpoint's metadata: {error}") from error
    if metadata.inventory != list(INVENTORY[: len(metadata.inventory)]):
        raise ValueError(f"{path}: the model was trained with another phoneme inventory")
    return metadata


def load(
    folder: Path, device: str = "cpu", *, allow_old_format: bool = False
) -> tuple[AR | NAR, CheckpointMetadata]:
    """The model of a checkpoint, in evaluation mode, and its metadata.

    Raises ValueError for a NAR model of an earlier format, which would speak badly without a word;
    `allow_old_format` takes it as a beginning.
    """
    metadata = read_metadata(folder)
    if metadata.kind == "nar" and metadata.format < FORMAT and not allow_old_format:
        raise ValueError(
            f"{folder / CONFIG}: a NAR model of format {metadata.format}, whose prompt saw more "
            f"than itself; train it further with this code (`warm_start.nar=...`)"
        )
    model = build_model(metadata.kind, metadata.model)
    try:
        weights = load_weights(folder, device)
        model.load_state_dict(weights, strict=True, assign=True)
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(f"{folder / WEIGHTS} does not fit its {CONFIG}: {error}") from error
    return model.to(device).eval(), metadata


def load_from_uri(uri: str, codec: CodecIdentity, *, allow_old_format: bool = False) -> AR | NAR:
    """The model of a checkpoint, or of a run's best one, at a path or URI.

    Raises ValueError when it was trained on the codes of another codec, and as `load` does.
    """
    with tempfile.TemporaryDirectory() as name:
        fetch(find_best(uri), Path(name) / "model")
        model, metadata = load(Path(name) / "model", allow_old_format=allow_old_format)
    codec.check(metadata.codec, uri)
    return model


def warm_start(model: AR | NAR, uri: str, codec: CodecIdentity) -> None:
    """Gives `model` the weights of another one at a path or URI.

    Raises ValueError when that is not built as `model` is (dropout apart), or knows another codec.
    """
    other = load_from_uri(uri, codec, allow_old_format=True)
    if type(other) is not type(model):
        raise ValueError(f"warm_start: {uri} holds an {type(other).__name__} model")
    theirs, ours = asdict(other.config), asdict(model.config)
    ignored = ("dropout",) if isinstance(model, AR) else ("dropout", "group")
    for name in theirs:
        if theirs[name] != ours[name] and name not in ignored:
            raise ValueError(
                f"warm_start: {uri} has {name} {theirs[name]}, this run has {ours[name]}"
            )
    model.load_state_dict(other.state_dict())


def save_state(folder: Path, state: TrainState) -> None:
    """Writes the state of a run below `state/`."""
    target = folder / STATE
    target.mkdir(parents=True, exist_ok=True)
    (target / "train_state.json").write_text(json.dumps(asdict(state)))


def load_state(folder: Path) -> TrainState:
    """Reads the state of a run."""
    return TrainState(**json.loads((folder / STATE / "train_state.json").read_text()))


def save_metrics(folder: Path, metrics: Mapping[str, float]) -> None:
    """Writes what validation said."""
    (folder / METRICS).write_text(json.dumps(dict(metrics), indent=2) + "\n")


def find_best(uri: str) -> str:
    """`uri` itself when it is a checkpoint, else the best `step_*` folder of the run it names.

    Best is the lowest word error rate where a quick check measured one, else the newest. Raises
    FileNotFoundError when there is none.
    """
    if storage.exists(storage.join(uri, WEIGHTS)):
        return uri
    paths = storage.list_files(uri, (WEIGHTS,))
    steps = sorted(path.split("/")[0] for path in paths if path.startswith("step_"))
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {uri}: train first")
    rates = {step: _word_error_rate(storage.join(uri, step, METRICS)) for step in steps}
    measured = {step: rate for step, rate in rates.items() if rate is not None}
    best = min(measured, key=lambda step: measured[step]) if measured else steps[-1]
    return storage.join(uri, best)


def _word_error_rate(path: str) -> float | None:
    return storage.read_json(path).get(WORD_ERROR_RATE) if storage.exists(path) else None


def fetch(uri: str, folder: Path) -> None:
    """Copies weights and metadata of a checkpoint from anywhere into a new local folder."""
    folder.mkdir(parents=True)
    for name in (WEIGHTS, CONFIG):
        source = storage.join(uri, name)
        if not storage.exists(source):
            raise FileNotFoundError(f"no checkpoint at {uri}: {name} is missing")
        (folder / name).write_bytes(storage.read_bytes(source))


def load_weights(folder: Path, device: str = "cpu") -> dict[str, Tensor]:
    """The weights alone."""
    return from_int8(load_file(folder / WEIGHTS, device=device))


def save_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.AdamW) -> None:
    """AdamW's averages as safetensors, named after the parameters they belong to."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{name}/{key}"] = value.detach().cpu().contiguous()
    save_file(tensors, folder / STATE / "optimizer.safetensors")


def load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.AdamW) -> None:
    """Restores AdamW's averages; every parameter must have its own."""
    tensors = load_file(folder / STATE / "optimizer.safetensors")
    for name, parameter in model.named_parameters():
        keys = ("step", "exp_avg", "exp_avg_sq")
        state = {key: tensors[f"{name}/{key}"].to(parameter.device) for key in keys}
        if not optimizer.defaults["fused"]:  # only fused AdamW counts steps beside the weights
            state["step"] = state["step"].cpu()
        optimizer.state[parameter] = state


_STRICT = dacite.Config(strict=True)

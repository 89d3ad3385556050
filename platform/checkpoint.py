"""The checkpoint format, and the only code that reads or writes it.

    model.safetensors   weights of one model; shipped ones in int8 with scales (quantize.py)
    config.json         kind, architecture, recipe, code version, codec, phoneme inventory
    metrics.json        what validation said of it
    state/              what a resumed run needs besides: counters and optimizer

Weights are safetensors and are never unpickled. The optimizer of the `ddp` backend is safetensors
too; DeepSpeed keeps its own shards in `state/deepspeed`, which only the same run reads back.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import dacite
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from valle.model.ar import AR
from valle.model.codec.interface import CodecIdentity
from valle.model.config import ARConfig, Kind, NARConfig
from valle.model.nar import NAR
from valle.model.quantize import from_int8
from valle.model.text import INVENTORY
from valle.platform import storage

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
METRICS = "metrics.json"
STATE = "state"
FORMAT = 3
"""What the files mean. 3: only an AR model's config has a `group_size`. 2: every config has a
`group`, which NAR models ignore. 1: a NAR model's prompt sees everything, so that its weights mean
something else; since 2 a prompt sees only itself. AR weights are the same in all."""

FIRST_NAR_FORMAT = 2
"""NAR weights of earlier formats can begin a training run, but generate badly."""

WORD_ERROR_RATE = "validation/wer"
"""Name of the metric that decides which checkpoint of a run is the best."""


@dataclass
class TrainState:
    """Where a run is: all that a checkpoint needs besides weights and optimizer."""

    step: int = 0
    """Optimizer steps done."""

    epoch: int = 0
    """Pass over the data; the batch plan is a function of it."""

    batch: int = 0
    """Batches of this epoch already used by each worker."""

    def to_dict(self) -> dict[str, int]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class CheckpointMetadata:
    """`config.json`: everything about a checkpoint but its numbers."""

    kind: Kind
    model: ARConfig | NARConfig
    codec: CodecIdentity
    inventory: list[str]
    """Phoneme symbols by id."""
    code_version: str
    """Of the code that trained it."""
    recipe: dict[str, Any]
    """The resolved recipe of the run."""
    format: int = 1
    """See `FORMAT`. As read: this code's, unless the weights mean something else."""


def new_metadata(
    model: ARConfig | NARConfig, codec: CodecIdentity, code_version: str, recipe: dict[str, Any]
) -> CheckpointMetadata:
    """Metadata with this code's phoneme inventory."""
    return CheckpointMetadata(
        kind=model.kind, model=model, codec=codec, inventory=list(INVENTORY),
        code_version=code_version, recipe=recipe, format=FORMAT,
    )  # fmt: skip


def build_model(config: ARConfig | NARConfig) -> AR | NAR:
    """A fresh model."""
    return AR(config) if isinstance(config, ARConfig) else NAR(config)


def save(folder: Path, weights: Mapping[str, Tensor], metadata: CheckpointMetadata) -> None:
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
        metadata = _parse_metadata(json.loads(path.read_text()))
    except (json.JSONDecodeError, dacite.DaciteError, ValueError) as error:
        raise ValueError(f"{path} is not a checkpoint's metadata: {error}") from error
    if metadata.inventory != list(INVENTORY[: len(metadata.inventory)]):
        raise ValueError(f"{path}: the model was trained with another phoneme inventory")
    return metadata


def _parse_metadata(content: dict[str, Any]) -> CheckpointMetadata:
    """The content of a `config.json` of any format. Raises DaciteError or ValueError."""
    kind, format = content.get("kind"), content.get("format", 1)
    if kind not in _CONFIGS:
        raise ValueError(f"kind: {kind!r} is none of {sorted(_CONFIGS)}")
    if format > FORMAT:
        raise ValueError(f"format: {format} is of newer code; this code reads up to {FORMAT}")
    model = dict(content.get("model", {}))
    if format < FORMAT and "group" in model:
        group_size = model.pop("group")
        if kind == "ar":
            model["group_size"] = group_size
    if kind == "ar" or format >= FIRST_NAR_FORMAT:
        format = FORMAT
    config = dacite.from_dict(_CONFIGS[kind], model, _STRICT)
    content = {**content, "model": config, "format": format}
    return dacite.from_dict(CheckpointMetadata, content, _STRICT)


def load(
    folder: Path, device: str = "cpu", *, allow_old_format: bool = False
) -> tuple[AR | NAR, CheckpointMetadata]:
    """The model of a checkpoint, in evaluation mode, and its metadata.

    Raises ValueError for a NAR model before `FIRST_NAR_FORMAT`, which would silently generate bad
    codes; `allow_old_format` loads it as the beginning of a training run.
    """
    metadata = read_metadata(folder)
    if metadata.kind == "nar" and metadata.format < FIRST_NAR_FORMAT and not allow_old_format:
        raise ValueError(
            f"{folder / CONFIG}: a NAR model of format {metadata.format}, whose prompt saw more "
            f"than itself; train it further with this code (`warm_start.nar=...`)"
        )
    model = build_model(metadata.model)
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
    for field in theirs:
        if theirs[field] != ours[field] and field != "dropout":
            raise ValueError(
                f"warm_start: {uri} has {field} {theirs[field]}, this run has {ours[field]}"
            )
    model.load_state_dict(other.state_dict())


def save_state(folder: Path, state: TrainState) -> None:
    """Writes the counters of a run below `state/`."""
    target = folder / STATE
    target.mkdir(parents=True, exist_ok=True)
    (target / "train_state.json").write_text(json.dumps(state.to_dict()))


def load_state(folder: Path) -> TrainState:
    """The counters of a run."""
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
    """Puts saved averages back; every parameter must have its own."""
    tensors = load_file(folder / STATE / "optimizer.safetensors")
    for name, parameter in model.named_parameters():
        keys = ("step", "exp_avg", "exp_avg_sq")
        optimizer.state[parameter] = {
            # fused AdamW keeps its step counter beside the weights
            key: tensors[f"{name}/{key}"].to(parameter.device)
            for key in keys
        }


_CONFIGS: dict[str, type[ARConfig] | type[NARConfig]] = {"ar": ARConfig, "nar": NARConfig}
_STRICT = dacite.Config(strict=True)

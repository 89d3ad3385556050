"""The checkpoint format: no other module reads or writes these files.

    model.safetensors   weights of one model; int8 with scales in shipped bundles (quantize.py)
    config.json         kind, architecture, recipe, code version, codec, phoneme inventory
    metrics.json        validation metrics
    state/              for resuming: counters and optimizer state
    COMPLETE            sizes and hashes of the others, written last (checkpoint_files.py)

Weights are safetensors and are never unpickled. So is the optimizer state of the `ddp` backend;
DeepSpeed writes shards of its own to `state/deepspeed`, which only the same run reads.
"""

import hashlib
import json
import math
import re
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
from valle.model.config import ARConfig, Kind, NARConfig
from valle.model.nar import NAR
from valle.model.quantize import from_int8
from valle.model.text import INVENTORY, inventory_matches
from valle.platform import checkpoint_files, storage
from valle.platform.checkpoint_files import BrokenCheckpointError
from valle.platform.typed import from_dict
from valle.platform.weights_header import check_shapes

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
METRICS = "metrics.json"
STATE = "state"
_STEP = re.compile(r"step_\d+")
_CONFIGS: dict[str, type[ARConfig] | type[NARConfig]] = {"ar": ARConfig, "nar": NARConfig}

FORMAT = 3
"""Version of the format. 3: only an AR model's config has a `group_size`. 2: every config has a
`group`, which NAR models ignore. 1: a NAR model's prompt attends to the whole sequence, since 2 to
itself only. AR weights are the same in all."""

FIRST_NAR_FORMAT = 2
"""NAR weights of earlier formats can start a training run, but generate badly."""

WORD_ERROR_RATE = "validation/wer"
"""The metric by which `find_best` ranks the checkpoints of a run."""


@dataclass(frozen=True)
class TrainState:
    """State of a training run: all that a resumed run needs besides weights and optimizer."""

    step: int = 0
    """Optimizer steps taken."""

    epoch: int = 0
    """Number of the current pass over the data; selects its batch plan."""

    position: int = 0
    """Position in this epoch's data. AR and NAR: batches that all workers together have used, so
    that another number of workers goes on with the next batch. Codecs: batches of each worker."""

    averages: dict[str, float] = field(default_factory=dict)
    """Running averages of the training metrics; empty where single steps are logged."""

    skipped: int = 0
    """Batches without a step, because loss or gradient was not finite."""

    resumed_anyway: tuple[str, ...] = ()
    """What `resume_anyway` has let change, and the reasons given."""


@dataclass(frozen=True, kw_only=True)
class CheckpointMetadata:
    """The contents of `config.json`."""

    kind: Kind
    model: ARConfig | NARConfig
    codec: CodecIdentity
    inventory: list[str]
    """Phoneme symbols by id."""
    code_version: str
    """Version of the code that trained the model."""
    recipe: dict[str, Any]
    """The resolved recipe of the run."""
    format: int = 1
    """Format of the weights, see `FORMAT`. As read: `FORMAT`, unless they mean something else."""
    dataset: str | None = None
    """SHA-256 of what the token dataset consists of; None: unknown, of an earlier checkpoint."""
    text_version: int | None = None
    """Version of the text processing (`model/normalize.py`) that made the dataset's phonemes; None:
    unknown, of an earlier checkpoint, which counts as 1."""
    languages: tuple[str, ...] = ()
    """Languages of the dataset; empty if unknown."""


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
    dataset: str | None = None
    """SHA-256 of the names of the recordings; None: unknown, of an earlier checkpoint."""


def new_metadata(
    model: ARConfig | NARConfig,
    codec: CodecIdentity,
    code_version: str,
    recipe: dict[str, Any],
    dataset: str | None = None,
    text_version: int | None = None,
    languages: tuple[str, ...] = (),
) -> CheckpointMetadata:
    """Metadata of the present format and phoneme inventory; the last three are the dataset's."""
    return CheckpointMetadata(
        kind=model.kind,
        model=model,
        codec=codec,
        inventory=list(INVENTORY),
        code_version=code_version,
        recipe=recipe,
        format=FORMAT,
        dataset=dataset,
        text_version=text_version,
        languages=languages,
    )


def build_model(config: ARConfig | NARConfig) -> AR | NAR:
    """A model with newly initialised weights."""
    return AR(config) if isinstance(config, ARConfig) else NAR(config)


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
    """The metadata of a checkpoint.

    Raises FileNotFoundError, and ValueError for unreadable metadata or another phoneme inventory.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint in {folder}: {CONFIG} is missing")
    try:
        metadata = _parse_metadata(json.loads(path.read_text()))
    except (ArithmeticError, TypeError, dacite.DaciteError, ValueError) as error:
        raise ValueError(f"{path} is not a checkpoint's metadata: {error}") from error
    if not inventory_matches(metadata.inventory):
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
    config = from_dict(_CONFIGS[kind], model)
    content = {**content, "model": config, "format": format}
    return from_dict(CheckpointMetadata, content)


def load(
    folder: Path, device: str = "cpu", *, allow_old_format: bool = False
) -> tuple[AR | NAR, CheckpointMetadata]:
    """The model of a checkpoint, in evaluation mode, and its metadata.

    Raises ValueError for weights that do not fit the metadata, and for a NAR model of an earlier
    format, whose speech would be worse without any error; `allow_old_format` accepts such a model
    as the start of further training.
    """
    metadata = read_metadata(folder)
    if metadata.kind == "nar" and metadata.format < FIRST_NAR_FORMAT and not allow_old_format:
        raise ValueError(
            f"{folder / CONFIG}: a NAR model of format {metadata.format}, whose prompt attends to "
            f"more than itself; train it further with this code (`warm_start.nar=...`)"
        )
    try:
        check_shapes(folder / WEIGHTS, metadata.model)
        model = build_model(metadata.model)
        weights = load_weights(folder, device)
        model.load_state_dict(weights, strict=True, assign=True)
    except (SafetensorError, RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"{folder / WEIGHTS} does not fit its {CONFIG}: {error}") from error
    return model.to(device).eval(), metadata


def load_from_uri(uri: str, codec: CodecIdentity, *, allow_old_format: bool = False) -> AR | NAR:
    """The model of a checkpoint, or of the best checkpoint of a run, at a path or URI.

    Raises ValueError for a model of another codec, and as `load` does.
    """
    with tempfile.TemporaryDirectory() as name:
        fetch(find_best(uri), Path(name) / "model")
        model, metadata = load(Path(name) / "model", allow_old_format=allow_old_format)
    codec.check(metadata.codec, uri)
    return model


def warm_start(model: AR | NAR, uri: str, codec: CodecIdentity) -> None:
    """Copies the weights of another model, at a path or URI, into `model`.

    Raises ValueError for a model of another architecture (dropout may differ) or codec.
    """
    source = load_from_uri(uri, codec, allow_old_format=True)
    if type(source) is not type(model):
        raise ValueError(f"warm_start: {uri} holds an {type(source).__name__} model")
    source_config, config = asdict(source.config), asdict(model.config)
    for name in source_config:
        if source_config[name] != config[name] and name != "dropout":
            raise ValueError(
                f"warm_start: {uri} has {name} {source_config[name]}, this run has {config[name]}"
            )
    model.load_state_dict(source.state_dict())


def save_state(folder: Path, state: TrainState) -> None:
    """Writes the state of a run below `state/`."""
    target = folder / STATE
    target.mkdir(parents=True, exist_ok=True)
    (target / "train_state.json").write_text(json.dumps(asdict(state)))


def load_state(folder: Path) -> TrainState:
    """Reads the state of a run.

    Earlier checkpoints count the batches of each worker; the recipe has the number of workers.
    """
    values = json.loads((folder / STATE / "train_state.json").read_text())
    if "batch" in values:
        workers = 1
        if (folder / CONFIG).is_file():
            content = json.loads((folder / CONFIG).read_text())
            if content["kind"] in _CONFIGS:
                workers = content["recipe"].get("workers", 1)
        values["position"] = values.pop("batch") * workers
    values["resumed_anyway"] = tuple(values.get("resumed_anyway", ()))
    return TrainState(**values)


def save_metrics(folder: Path, metrics: Mapping[str, float]) -> None:
    """Writes validation metrics."""
    (folder / METRICS).write_text(json.dumps(dict(metrics), indent=2) + "\n")


def find_best(uri: str) -> str:
    """The URI of a checkpoint: `uri` itself, or the best `step_*` folder of the run at `uri`.

    The best has the lowest word error rate; if no quick check measured one, it is the newest.
    Only whole checkpoints count (`checkpoint_files`); others are left out with a warning. Raises
    FileNotFoundError when there is none, and BrokenCheckpointError if `uri` itself is not whole.
    """
    if storage.exists(storage.join(uri, WEIGHTS)):
        if fault := checkpoint_files.find_fault(uri):
            raise BrokenCheckpointError(f"{uri}: {fault}")
        return uri
    steps = list_whole(uri)
    rates = {step: _word_error_rate(storage.join(uri, step, METRICS)) for step in steps}
    measured = {step: rate for step, rate in rates.items() if rate is not None}
    best = min(measured, key=lambda step: measured[step]) if measured else steps[-1]
    if not checkpoint_files.is_sealed(storage.join(uri, best)):
        checkpoint_files.warn(
            storage.join(uri, best), f"no {checkpoint_files.COMPLETE}", "its files look whole: used"
        )
    return storage.join(uri, best)


def list_steps(uri: str) -> list[str]:
    """Names of a run's checkpoint folders, whole or not, oldest first."""
    names = {path.split("/")[0] for path in storage.list_files(uri) if "/" in path}
    return sorted(name for name in names if _STEP.fullmatch(name))


def list_whole(uri: str) -> list[str]:
    """Names of a run's whole checkpoints, oldest first, with a warning for each other one.

    Raises FileNotFoundError when there is none.
    """
    faults = {
        step: checkpoint_files.find_fault(storage.join(uri, step)) for step in list_steps(uri)
    }
    for step, fault in faults.items():
        if fault is not None:
            checkpoint_files.warn(storage.join(uri, step), fault, "not used")
    whole = [step for step, fault in faults.items() if fault is None]
    if not whole:
        broken = "; ".join(f"{step}: {fault}" for step, fault in faults.items())
        reason = f"none is whole ({broken})" if broken else "train first"
        raise FileNotFoundError(f"no checkpoint in {uri}: {reason}")
    return whole


def _word_error_rate(path: str) -> float | None:
    rate = storage.read_json(path).get(WORD_ERROR_RATE) if storage.exists(path) else None
    return rate if rate is not None and math.isfinite(rate) else None


def fetch(uri: str, folder: Path) -> None:
    """Copies weights and metadata of the checkpoint at a path or URI into a new local folder.

    Raises FileNotFoundError for an incomplete checkpoint, and BrokenCheckpointError for a file
    that is not the one that was written.
    """
    files = checkpoint_files.read_marker(uri) if checkpoint_files.is_sealed(uri) else {}
    folder.mkdir(parents=True)
    for name in (WEIGHTS, CONFIG):
        source = storage.join(uri, name)
        if not storage.exists(source):
            raise FileNotFoundError(f"no checkpoint at {uri}: {name} is missing")
        content = storage.read_bytes(source)
        if name in files and hashlib.sha256(content).hexdigest() != files[name].sha256:
            raise BrokenCheckpointError(f"{source} is not what was written: its SHA-256 differs")
        (folder / name).write_bytes(content)


def load_weights(folder: Path, device: str = "cpu") -> dict[str, Tensor]:
    """The weights of a checkpoint, as floats."""
    return from_int8(load_file(folder / WEIGHTS, device=device))


def save_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.AdamW) -> None:
    """Writes AdamW's state as safetensors, named after the parameters."""
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

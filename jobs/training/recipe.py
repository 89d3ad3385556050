"""The `train` section of a recipe."""

from dataclasses import asdict, dataclass, field, replace

from valle.jobs.training.optimizer import Optimization
from valle.jobs.training.sampler import Batching
from valle.jobs.training.validation import QuickCheck
from valle.model.codec.loading import CODEC_NAMES
from valle.model.config import SIZES, ARConfig, Kind, NARConfig
from valle.platform import registry
from valle.platform.recipe import formerly, location
from valle.platform.resources import Placement


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """A preset of sizes, and the fields that replace its own."""

    size: str = "mini"
    """mini (256 wide, 6 layers), quarter, half or full (12 layers; 256, 512, 1024 wide)."""

    width: int | None = None
    """Width of the transformer; None: the preset's."""

    n_heads: int | None = None
    """Attention heads; None: the preset's."""

    n_layers: int | None = None
    """Transformer blocks; None: the preset's."""

    dropout: float | None = None
    """Dropout rate in training; None: the preset's."""

    group_size: int = field(default=1, metadata=formerly("group"))
    """Frames per step of the AR model (VALL-E 2's grouped codes)."""

    frames_per_phoneme: float | None = None
    """Estimated frames per phoneme; None: the preset's 4, which fits 75 frames a second."""

    def resolve(self, kind: Kind) -> ARConfig | NARConfig:
        """The architecture of one of the models."""
        if self.size == "nano":
            raise ValueError("model.size: 'nano' is called 'mini' now")
        if self.size not in SIZES:
            raise ValueError(f"model.size: {self.size!r} is none of {sorted(SIZES)}")
        changes = {
            name: value
            for name, value in asdict(self).items()
            if name not in ("size", "group_size") and value is not None
        }
        shared = replace(SIZES[self.size], **changes)
        if kind == "ar":
            return ARConfig.from_shared(shared, group_size=self.group_size)
        return NARConfig.from_shared(shared)


@dataclass(frozen=True, kw_only=True)
class TrainRecipe:
    """One training run of the AR and NAR models."""

    data: str = field(metadata=location())
    """Folder or URI of the token dataset."""

    run: str
    """Name of the run; a run of the same name resumes. The models are `{run}-ar` and `{run}-nar` in
    `storage_path` and in MLflow."""

    storage_path: str = field(default="runs", metadata=location() | formerly("storage"))
    """Folder or URI for checkpoints."""

    models: tuple[Kind, ...] = ("ar", "nar")
    """Models to train, in this order."""

    model: ModelSize = field(default_factory=ModelSize)
    """Architecture of both models."""

    steps: dict[str, int] = field(default_factory=lambda: {"ar": 100_000, "nar": 100_000})
    """Optimizer steps by model."""

    warm_start: dict[str, str] = field(default_factory=dict, metadata=location(names=("nano",)))
    """Initial weights by model (`ar`, `nar`): a checkpoint, a run's folder, or `nano`, the shipped
    model. The optimizer and its schedule start from the beginning."""

    optimization: Optimization = field(default_factory=Optimization)
    """AdamW and its learning-rate schedule."""

    batching: Batching = field(default_factory=Batching)
    """Size of a worker's batches."""

    prompt_seconds: float = 3.0
    """Longest prompt: a random piece of another utterance by the same speaker."""

    min_prompt_seconds: float | None = field(default=None, metadata=formerly("shortest_prompt"))
    """Shortest prompt: the prompt length of each batch is drawn between this and `prompt_seconds`.
    Trains the models for short prompts, at less cost per step. None: always `prompt_seconds`."""

    utterances_per_speaker: int | None = None
    """Most utterances of a speaker in an epoch, others in each epoch. Balances speakers of very
    different amounts of speech. None: all."""

    level_emphasis: float = 0.0
    """Preference of NAR training for low codebooks, which carry the words: codebook k is drawn with
    weight 1 / k ** level_emphasis. 0 is uniform, as in the paper."""

    condition_dropout: float = 0.1
    """Share of the utterances whose text and prompt are hidden, which sampling with a
    `guidance_scale` above 1 needs. The paper has none."""

    truncated_share: float = field(default=0.25, metadata=formerly("beginnings"))
    """Share of the utterances that the NAR model sees only the beginning of, as it does when a
    sentence is streamed in chunks. The paper has none. Batches are not repacked, so `train/padding`
    rises with it."""

    validation_utterances: int = 64
    """Held-out utterances, evenly spread over the dataset and so over speakers; at most a tenth of
    it."""

    backend: str = "ddp"
    """ddp or deepspeed."""

    zero_stage: int = 1
    """ZeRO stage of DeepSpeed: 1 shards optimizer states, 2 also gradients, 3 also weights."""

    precision: str = "fp32"
    """fp32 or bf16 (autocast with ddp)."""

    compile: bool = False
    """torch.compile for the transformer: needs a C++ compiler and a minute at the start; steps on a
    CPU take a quarter less time. Not tested on a GPU."""

    workers: int = 1
    """Data-parallel workers."""

    threads: int = 1
    """Torch threads per worker on a CPU, and the cores reserved for it unless
    `placement.cpus_per_worker` is set."""

    placement: Placement = field(default_factory=Placement)
    """CPU or GPU, and each worker's share of one."""

    checkpoint_every: int = 1000
    """Steps between checkpoints, each with validation and samples."""

    log_every: int = 20
    """Steps between training metrics."""

    keep_checkpoints: int = 2
    """Number of checkpoints to keep: the last ones; with a quick check, the best ones and the
    last."""

    samples: int = 2
    """Held-out sentences synthesised at each checkpoint. The data's codes take the place of the
    other model's."""

    codec: str = field(default="nano", metadata=location(names=CODEC_NAMES))
    """Codec that decodes the samples; must be the dataset's."""

    quick_check: QuickCheck | None = None
    """Word error rate of a few sentences at some checkpoints. The best checkpoint by this rate is
    kept, and `publish` takes it."""

    max_failures: int = 2
    """Lost workers after which the run resumes; one more ends it."""

    max_skipped_in_row: int = 10
    """Most batches in a row that may be skipped because their loss or gradient is not finite; one
    more stops the run. `skipped/` in the run's folder lists their items."""

    resume_anyway: str | None = None
    """A reason to resume although settings or data have changed in a way that is otherwise refused.
    Later checkpoints record the reason with the changes. None: refuse."""

    seed: int = 0
    """Seed of initial weights, data order, prompts, codebook levels, hidden conditions, dropout."""

    def __post_init__(self) -> None:
        for name, value, options in (
            ("backend", self.backend, ("ddp", "deepspeed")),
            ("precision", self.precision, ("fp32", "bf16")),
        ):
            if value not in options:
                raise ValueError(f"{name}: {value!r} is none of {options}")
        shortest = self.min_prompt_seconds
        if shortest is not None and not 0 < shortest <= self.prompt_seconds:
            raise ValueError(f"min_prompt_seconds: {shortest} is not in (0, {self.prompt_seconds}]")
        if self.utterances_per_speaker is not None and self.utterances_per_speaker < 1:
            raise ValueError(f"utterances_per_speaker: {self.utterances_per_speaker} is below 1")
        if self.max_skipped_in_row < 0:
            raise ValueError(f"max_skipped_in_row: {self.max_skipped_in_row} is below 0")
        if self.level_emphasis < 0:
            raise ValueError(f"level_emphasis: {self.level_emphasis} is below 0")
        if not 0 <= self.condition_dropout < 1:
            raise ValueError(f"condition_dropout: {self.condition_dropout} is not in [0, 1)")
        if not 0 <= self.truncated_share < 1:
            raise ValueError(f"truncated_share: {self.truncated_share} is not in [0, 1)")
        if self.zero_stage not in (1, 2, 3):
            raise ValueError(f"zero_stage: {self.zero_stage} is none of 1, 2, 3")
        shared = self.placement.gpus_per_worker < 1 and self.placement.accelerator != "cpu"
        if self.backend == "deepspeed" and shared and self.workers > 1:
            raise ValueError(
                "placement.gpus_per_worker: DeepSpeed's workers need a whole GPU each, since NCCL "
                "lets no two share one; set 1, or backend=ddp"
            )
        if unknown := sorted(set(self.warm_start) - {"ar", "nar"}):
            raise ValueError(f"warm_start: {unknown[0]!r} is none of ar, nar")
        for kind in self.models:
            if kind not in ("ar", "nar") or self.steps.get(kind, 0) < 1:
                raise ValueError(
                    f"models / steps: {kind!r} needs to be ar or nar, with steps.{kind} above 0"
                )
        if self.quick_check and self.quick_check.every % self.checkpoint_every:
            raise ValueError(
                f"quick_check.every: {self.quick_check.every} is not a multiple of "
                f"checkpoint_every ({self.checkpoint_every})"
            )
        for kind in self.models:
            self.model.resolve(kind)


def warm_start_uri(recipe: TrainRecipe, kind: Kind) -> str:
    """Path or URI of the initial weights of a model; `nano` is shipped with the code."""
    uri = recipe.warm_start[kind]
    return str(registry.SHIPPED_BUNDLE / kind) if uri == "nano" else uri

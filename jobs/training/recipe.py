"""What a training run is told: the fields of a recipe's `train` section, checked."""

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
    """A preset and what differs from it."""

    size: str = "mini"
    """mini (256 wide, 6 layers), quarter, half or full (12 layers; 256, 512, 1024 wide)."""

    width: int | None = None
    """Instead of the preset's."""

    n_heads: int | None = None
    """Instead of the preset's."""

    n_layers: int | None = None
    """Instead of the preset's."""

    dropout: float | None = None
    """Instead of the preset's."""

    group_size: int = field(default=1, metadata=formerly("group"))
    """Frames per step of the AR model (VALL-E 2's grouped codes)."""

    frames_per_phoneme: float | None = None
    """Instead of the preset's 4, which is about right at 75 frames a second."""

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
    """One training run."""

    data: str = field(metadata=location())
    """Folder or URI of the token dataset."""

    run: str
    """Name of the run. The same name resumes; the models are kept as `{run}-ar` and `{run}-nar`."""

    storage_path: str = field(default="runs", metadata=location() | formerly("storage"))
    """Folder or URI for checkpoints."""

    models: tuple[Kind, ...] = ("ar", "nar")
    """What to train, in this order."""

    model: ModelSize = field(default_factory=ModelSize)
    """Architecture of both."""

    steps: dict[str, int] = field(default_factory=lambda: {"ar": 100_000, "nar": 100_000})
    """Optimizer steps of each model."""

    warm_start: dict[str, str] = field(default_factory=dict, metadata=location(names=("nano",)))
    """For `ar`, `nar`: a checkpoint, or a run's folder, whose weights a new run begins with, or
    `nano`, the shipped model. Optimizer state is not taken over: the schedule warms up again."""

    optimization: Optimization = field(default_factory=Optimization)
    """AdamW and its schedule."""

    batching: Batching = field(default_factory=Batching)
    """Token budget per worker."""

    prompt_seconds: float = 3.0
    """Longest prompt; each utterance gets a random piece of another one by its speaker."""

    min_prompt_seconds: float | None = field(default=None, metadata=formerly("shortest_prompt"))
    """The length of a batch's prompts is drawn between this and `prompt_seconds`, so that the
    models know short ones and cost less to train; None: always `prompt_seconds`."""

    utterances_per_speaker: int | None = None
    """An epoch takes at most so many of a speaker, others each time, so that a few who said most
    of it do not stand for everyone; None: all."""

    level_emphasis: float = 0.0
    """How much more often the NAR model is asked for low codebooks, which carry the words: level k
    is drawn with weight 1 / k ** level_emphasis; 0 asks for all alike, as the paper does."""

    condition_dropout: float = 0.1
    """Share of the utterances that are learnt without text and prompt, for a model that is to be
    spoken with a `guidance_scale` above 1; the paper has none."""

    truncated_share: float = field(default=0.25, metadata=formerly("beginnings"))
    """Share of the utterances of which the NAR model is shown, and asked for, only the beginning:
    for streaming inside a sentence (`chunked`); the paper has none. Batches stay as wide as they
    were planned, so that `train/padding` rises with it."""

    validation_utterances: int = 64
    """Held out, evenly spread over the dataset and so over speakers; at most a tenth of it."""

    backend: str = "ddp"
    """ddp or deepspeed."""

    zero_stage: int = 1
    """DeepSpeed's: 1 shards optimizer states, 2 gradients too, 3 weights too."""

    precision: str = "fp32"
    """fp32 or bf16 (autocast with ddp)."""

    compile: bool = False
    """torch.compile for the transformer: a minute at the start and a C++ compiler, for steps that
    take a quarter less time on a CPU. Not run on a GPU."""

    workers: int = 1
    """Data-parallel workers."""

    threads: int = 1
    """Torch threads per worker on a CPU, and the cores that are set aside for it where
    `placement.cpus_per_worker` does not say."""

    placement: Placement = field(default_factory=Placement)
    """CPU or GPU, and how much of one each worker takes."""

    checkpoint_every: int = 1000
    """Steps between checkpoints; each comes with validation and samples."""

    log_every: int = 20
    """Steps between training metrics."""

    keep_checkpoints: int = 2
    """Older ones are deleted; with a quick check, all but the best and the last."""

    samples: int = 2
    """Validation sentences spoken at each checkpoint (codes of the data stand in for the model
    that is not being trained)."""

    codec: str = field(default="nano", metadata=location(names=CODEC_NAMES))
    """Decodes the samples; must be the dataset's codec."""

    quick_check: QuickCheck | None = None
    """A few sentences spoken and read back at some checkpoints; the best by word error rate is
    kept, and `publish` takes it."""

    max_failures: int = 2
    """Worker losses survived before the run gives up."""

    seed: int = 0
    """Initial weights, order of the data, prompts, levels, hidden conditions, dropout."""

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
                raise ValueError(f"models / steps: {kind!r} needs to be ar or nar, with steps")
        if self.quick_check and self.quick_check.every % self.checkpoint_every:
            raise ValueError("quick_check.every: must be a multiple of checkpoint_every")
        self.model.resolve("ar")  # has the fields of both


def warm_start_uri(recipe: TrainRecipe, kind: Kind) -> str:
    """Where the weights come from that a new run begins with; `nano` comes with the code."""
    uri = recipe.warm_start[kind]
    return str(registry.SHIPPED_BUNDLE / kind) if uri == "nano" else uri

"""Arguments of the application: the configuration of a server, validated before anything starts."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from valle.model.chunks import Chunking
from valle.model.quantize import Precision
from valle.model.valle import GUIDANCE_SCALE, GUIDED_LEVELS

RENAMED_ARGS = {
    "reload_seconds": "registry_poll_seconds", "sentence_seconds": "max_sentence_seconds",
    "nar_slots": "nar_target_ongoing_requests", "nar_prompts": "nar_prompt_cache_size",
    "look_ahead": "lookahead",
}  # fmt: skip
"""Former name of a field of `AppArgs`: its name now."""


class AppArgs(BaseModel):
    """Arguments of `build_app`: the `args:` of a Serve config, or `key=value` after `serve run`."""

    model_config = ConfigDict(extra="forbid")

    model: str = "models:/valle@champion"
    """Registry URI, or the folder of a bundle."""

    tracking_uri: str | None = None
    """MLflow's address; default: `MLFLOW_TRACKING_URI`, or sqlite in `VALLE_HOME`."""

    voices: str = "data/voices"
    """Folder or `s3://` URI of reference recordings, shared by all replicas; `voice` in a request
    names one without its suffix."""

    api_keys: str | None = None
    """File of keys (see `serve/web/keys.py`); None: everybody may ask."""

    registry_poll_seconds: float = Field(10.0, gt=0)
    """How often to look whether the registry's alias has moved; then new requests get that
    version, and those that run are finished by the old one."""

    max_replicas: int = Field(4, ge=1)
    """Upper bound of each deployment's autoscaling."""

    upscale_delay_s: float = Field(5.0, ge=0)
    """How long more replicas must have been wanted before they are started."""

    downscale_delay_s: float = Field(120.0, ge=0)
    """How long fewer must have been wanted before some are stopped."""

    max_sentence_seconds: float = Field(20.0, gt=0, le=40)
    """Length limit of one sentence's speech; what deployments hand each other ends at 4 MiB."""

    max_seconds: float = Field(600.0, gt=0)
    """Length limit of an answer; a request may ask for less."""

    max_characters: int = Field(4096, ge=1, le=1_000_000)
    """Longest `input`; OpenAI's limit is 4096. A chapter of a book has thirty thousand, and speaks
    for half an hour: `max_seconds`, and Serve's `request_timeout_s`, have to allow it too."""

    slots: int = Field(8, ge=1)
    """Streams that one AR replica speaks at the same time; with guidance, each with two rows of
    key-value memory."""

    nar_target_ongoing_requests: int = Field(4, ge=1)
    """Requests that one NAR replica is to have, more want another: on a CPU eight at once take
    eight times as long as one; a GPU has room for more."""

    nar_prompt_cache_size: int = Field(8, ge=1)
    """Prompts that a NAR replica remembers having read: 19 MB of memory each for nano, 155 MB for
    the paper's size."""

    batch_seconds: float = Field(40.0, gt=0)
    """Padded speech in a batch of the NAR model, which guidance computes twice, or of the codec,
    which works it off in parts of ten seconds."""

    chunked: bool = False
    """Sound before a sentence is done, where a request does not say (`sentence.py`)."""

    first_chunk: int = Field(15, ge=8)
    """Frames of 1/75 s that are spoken first, in chunks."""

    lookahead: int = Field(12, ge=1)
    """Frames of a chunk that wait for the next one, so that the NAR model sees past a cut."""

    guidance_scale: float = Field(GUIDANCE_SCALE, ge=1, le=10)
    """Classifier-free guidance of both models: how closely they keep to text and voice. 1 is off,
    with half the rows to compute."""

    guided_levels: int = Field(GUIDED_LEVELS, ge=0, le=7)
    """Codebooks from the second on that the NAR model fills in with guidance."""

    precision: Precision = "fp32"
    """What models compute in. int8 (the matrices of the AR model's transformer, beside a NAR model
    in bf16) pays on a CPU with AVX-512 and bf16 (jobs/bench/engine.py); bf16 is for GPUs and for
    CPUs with AMX. In bf16 a seed's speech may depend on who is spoken beside it."""

    compiled: bool = False
    """Compiles a step of the AR model, on a GPU as CUDA graphs (not run on one yet), and its
    reading of texts; the first requests of a replica wait for it. On a CPU it does not pay
    (jobs/bench/engine.py)."""

    max_phonemes: int = Field(1000, ge=10)
    """Longest sentence, in symbols of IPA (about 18 a second); more is refused."""

    max_body_bytes: int = Field(10_000_000, ge=1_000)
    """Larger requests are refused before they are read."""

    use_gpu: bool = False
    """One GPU per AR and NAR replica (written to the documentation, not run on a GPU yet)."""

    @model_validator(mode="before")
    @classmethod
    def _renamed_fields_fail(cls, values: Any) -> Any:
        for name, present in RENAMED_ARGS.items():
            if isinstance(values, dict) and name in values:
                raise ValueError(f"{name} is called {present} now")
        return values

    @model_validator(mode="after")
    def _int8_is_for_cpus(self) -> Self:
        if self.precision == "int8" and (self.use_gpu or self.compiled):
            raise ValueError("precision: int8 is for CPUs, without use_gpu and compiled")
        return self

    def chunking(self) -> Chunking:
        """Sizes of chunks."""
        return Chunking(first_frames=self.first_chunk, lookahead=self.lookahead)

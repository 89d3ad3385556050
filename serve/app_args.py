"""Configuration of the endpoint: the arguments of the Serve application, validated at the start."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from valle.model.chunks import Chunking
from valle.model.languages import espeak_voice
from valle.model.quantize import Precision
from valle.model.valle import GUIDANCE_SCALE, GUIDED_LEVELS

RENAMED_ARGS = {
    "reload_seconds": "registry_poll_seconds",
    "sentence_seconds": "max_sentence_seconds",
    "nar_slots": "nar_target_ongoing_requests",
    "nar_prompts": "nar_prompt_cache_size",
    "look_ahead": "lookahead",
}
"""Former names of fields of `AppArgs`, with the present ones."""


class AppArgs(BaseModel):
    """Arguments of `serve.app.build_app`: `args:` in a Serve configuration, `key=value` after
    `serve run`."""

    model_config = ConfigDict(extra="forbid")

    model: str = "models:/valle@champion"
    """Registry URI or folder of a bundle."""

    tracking_uri: str | None = None
    """MLflow's address; None: `MLFLOW_TRACKING_URI`, or sqlite in `VALLE_HOME`."""

    languages: tuple[str, ...] | None = None
    """Languages that a request may name, as BCP 47 tags; None: those that the model was trained on,
    or en-US if its bundle does not say."""

    voices: str = "data/voices"
    """Folder or `s3://` URI of reference recordings, shared by all replicas. A request names a
    recording without its suffix."""

    api_keys: str | None = None
    """File of API keys (`serve/web/keys.py`); None: requests need no key, and the server may listen
    on a loopback address only."""

    api_keys_poll_seconds: float = Field(10.0, gt=0)
    """Seconds between two readings of the key file. Added and removed keys take effect at the next
    reading."""

    open: bool = False
    """Permit an endpoint without keys on an address that other machines reach. Everybody may then
    speak, and add and delete voices."""

    allowed_hosts: tuple[str, ...] = ()
    """Host names by which clients may reach the server (`Host` header), without ports:
    `tts.example.com`, `*.example.com`. Empty: only localhost on a loopback address, any name on
    another address."""

    allow_origins: tuple[str, ...] = ()
    """Other web origins whose pages may use the server (CORS), as `https://chat.example.com`; `*`:
    the pages of every origin."""

    inline: bool = True
    """Accept recordings in requests (`ref_audio`). False: only stored voices, each with a stated
    consent."""

    max_voices: int = Field(1000, ge=0)
    """Voices that may be stored; each is at most 1.5 MB."""

    registry_poll_seconds: float = Field(10.0, gt=0)
    """Seconds between two lookups of the registry's alias. When it has moved, new requests get the
    new version; running ones finish with the old one."""

    max_replicas: int = Field(4, ge=1)
    """Upper bound of the replicas of each deployment (autoscaling)."""

    ingress_replicas: int | None = Field(None, ge=1)
    """Lower bound of the ingress replicas. None: two on a cluster of several nodes or of eight CPUs
    and more, where one may die; one on a laptop."""

    upscale_delay_s: float = Field(5.0, ge=0)
    """Seconds of high demand before replicas are added."""

    downscale_delay_s: float = Field(120.0, ge=0)
    """Seconds of low demand before replicas are removed."""

    max_sentence_seconds: float = Field(20.0, gt=0, le=40)
    """Length limit of one sentence's speech. The upper bound keeps a message between deployments
    below 4 MiB."""

    max_seconds: float = Field(600.0, gt=0)
    """Length limit of a response; a request may set a lower one."""

    max_characters: int = Field(4096, ge=1, le=1_000_000)
    """Length limit of `input`; OpenAI's is 4096. A book chapter of 30,000 characters is half an
    hour of speech: raise `max_seconds` and Serve's `request_timeout_s` with it."""

    slots: int = Field(8, ge=1)
    """Requests that one AR replica decodes in a batch; with guidance, each takes two rows of the
    key-value cache."""

    nar_target_ongoing_requests: int = Field(4, ge=1)
    """Concurrent requests per NAR replica that autoscaling aims at. On a CPU, a batch of eight
    takes eight times as long as one request; a GPU has room for more."""

    nar_prompt_cache_size: int = Field(8, ge=1)
    """Prompts whose keys and values a NAR replica caches: 19 MB each for nano, 155 MB for the
    paper's size."""

    nar_prompt_cache_seconds: float = Field(600.0, gt=0)
    """Lifetime of a prompt in that cache. Deleting a voice empties the cache at once. A response
    that has begun may add the prompt again, for this time at most."""

    batch_seconds: float = Field(40.0, gt=0)
    """Upper bound of the padded speech in a batch, in seconds, for NAR and codec replicas. Guidance
    doubles the NAR model's batch; the codec splits its own into parts of ten seconds."""

    chunked: bool = False
    """Send the beginning of a sentence before its end is synthesized (`model/chunks.py`), if the
    request has no `chunked` of its own."""

    first_chunk: int = Field(15, ge=8)
    """Frames (1/75 s) of a sentence's first chunk."""

    lookahead: int = Field(12, ge=1)
    """Frames beyond a chunk's end that the NAR model sees and the next chunk decodes again."""

    guidance_scale: float = Field(GUIDANCE_SCALE, ge=1, le=10)
    """Classifier-free guidance of both models: higher values follow text and voice more closely. 1
    switches it off and halves the rows to compute."""

    guided_levels: int = Field(GUIDED_LEVELS, ge=0, le=7)
    """Codebooks, from the second on, that the NAR model decodes with guidance."""

    precision: Precision = "fp32"
    """Number format of the models' matrices. int8 (AR matrices; the NAR model runs in bf16) is
    faster on CPUs with AVX-512 and bf16 (jobs/bench/engine.py); bf16 is for GPUs and for CPUs with
    AMX. In bf16, the speech of a seed may depend on the other requests of its batch."""

    compiled: bool = False
    """Compile the AR model's decode step (on a GPU, no CUDA graph is captured yet) and its
    prefill. The first requests of a replica wait for the compiler; a CPU gains nothing
    (jobs/bench/engine.py)."""

    max_phonemes: int = Field(1000, ge=10)
    """Length limit of a sentence in phonemes (IPA symbols, about 18 a second)."""

    max_call_seconds: float = Field(600.0, gt=0)
    """Upper bound of one call of a deployment: waiting for a place in its queue, or for a replica,
    and computing a sentence. Then the request is answered with 503, or its stream ends."""

    max_step_seconds: float = Field(300.0, gt=0)
    """Upper bound, in seconds, of a step of the AR engine and of a NAR or codec batch. A replica
    in which one takes longer counts as stuck: it ends itself, and Serve replaces it. The first step
    of a `compiled` model takes minutes."""

    max_real_time_factor: float = Field(5.0, ge=1)
    """Upper bound of the seconds that a second of speech takes on a loaded machine. A replica that
    Serve stops may take this factor times the length limit to finish its calls."""

    max_body_bytes: int = Field(10_000_000, ge=1_000)
    """Size limit of an uploaded recording with its form. A speech request has the same limit, or
    the size of its largest fields together if that is less."""

    max_body_seconds: float = Field(60.0, gt=0)
    """Seconds within which a request body must have arrived."""

    use_gpu: bool = False
    """Give each AR and NAR replica a GPU (written after the documentation, not run on one yet)."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_former_names(cls, values: Any) -> Any:
        for name, present in RENAMED_ARGS.items():
            if isinstance(values, dict) and name in values:
                raise ValueError(f"{name} is called {present} now")
        return values

    @model_validator(mode="after")
    def _refuse_unknown_languages(self) -> Self:
        for language in self.languages or ():
            espeak_voice(language)
        if self.languages == ():
            raise ValueError("languages: at least one is needed")
        return self

    @model_validator(mode="after")
    def _refuse_int8_on_gpus(self) -> Self:
        if self.precision == "int8" and (self.use_gpu or self.compiled):
            raise ValueError("precision: int8 is for CPUs, without use_gpu and compiled")
        return self

    def chunking(self) -> Chunking:
        """Chunk sizes for `model.chunks`."""
        return Chunking(first_frames=self.first_chunk, lookahead=self.lookahead)

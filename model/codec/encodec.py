"""EnCodec 24 kHz (Défossez et al. 2022): waveforms to residual codes and back, in batches.

The networks are the classes of the `encodec` package. There are two sets of weights:
`encodec-24khz`, the official checkpoint (downloaded once and verified, or read from a path), and
`nano`, a narrow version of the same architecture, which ships with the repository.

Outside a model, codes are `int16 [Q, T]`, 75 frames a second, with values 0 .. 1023.
"""

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import valle
from valle.model.batches import batch_by_length
from valle.model.codec.interface import CodecIdentity, Codes, Wave
from valle.model.codec.torchaudio_stub import ensure_torchaudio
from valle.model.codec.weights import weights_hash
from valle.model.tokens import CODEBOOK_SIZE, FRAME_RATE, HOP, N_CODEBOOKS, SAMPLE_RATE

if TYPE_CHECKING:
    from encodec.model import EncodecModel

OFFICIAL_URL: Final = "https://dl.fbaipublicfiles.com/encodec/v0/encodec_24khz-d7cc33bc.th"
OFFICIAL_SHA256: Final = "d7cc33bcf1aad7f2dad9836f36431530744abeace3ca033005e3290ed4fa47bf"
"""Of the file at that address, 93,171,529 bytes, whose name holds the first eight digits."""
NANO_CODEC_FOLDER: Final = (
    Path(valle.__file__).resolve().parent.parent / "release" / "nano" / "codec"
)


@dataclass(frozen=True, kw_only=True)
class EncodecConfig:
    """Sizes of an EnCodec; the defaults are the official 24 kHz model."""

    name: str = "encodec-24khz"
    """Part of the codec's identity."""

    n_filters: int = 32
    """Channels of the outermost convolution; each of the four strides doubles them."""

    dimension: int = 128
    """Width of the quantised space."""

    lstm: int = 2
    """LSTM layers at the bottleneck, or 0."""

    n_codebooks: int = 32
    """Codebooks in the weights; the system uses the first 8."""

    def __post_init__(self) -> None:
        # a network is built before its weights are read: a file must not ask for all memory
        bounds = {"n_filters": (1, 64), "dimension": (1, 1024), "lstm": (0, 8),
                  "n_codebooks": (1, 64)}  # fmt: skip
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"codec: {name} is {value!r}, expected {low} to {high}")


def build(config: EncodecConfig) -> "EncodecModel":
    """An untrained EnCodec of the given size, on the CPU."""
    ensure_torchaudio()
    from encodec.model import EncodecModel
    from encodec.modules import SEANetDecoder, SEANetEncoder
    from encodec.quantization import ResidualVectorQuantizer

    with warnings.catch_warnings():
        # the package uses torch's deprecated weight normalisation
        warnings.filterwarnings("ignore", "`torch.nn.utils.weight_norm` is deprecated")
        encoder = SEANetEncoder(
            dimension=config.dimension, n_filters=config.n_filters, lstm=config.lstm, causal=True
        )
        decoder = SEANetDecoder(
            dimension=config.dimension, n_filters=config.n_filters, lstm=config.lstm, causal=True
        )
    quantizer = ResidualVectorQuantizer(
        dimension=config.dimension, n_q=config.n_codebooks, bins=CODEBOOK_SIZE, kmeans_init=False
    )
    bandwidths = [1.5, 3.0, 6.0, 12.0, 24.0]
    return EncodecModel(encoder, decoder, quantizer, bandwidths, SAMPLE_RATE, 1, name=config.name)


class Encodec:
    """A trained codec on a device: a `SpeechCodec`.

    All convolutions are causal and every input is padded to whole frames. The padding of a batch
    therefore does not change an item's frames.
    """

    def __init__(self, model: "EncodecModel", identity: CodecIdentity, device: str = "cpu") -> None:
        self.identity = identity
        self.device = torch.device(device)
        model.set_target_bandwidth(N_CODEBOOKS * 0.75)
        self.network = model.eval().requires_grad_(False).to(self.device)
        """The package's model, with weight normalisation folded into the weights."""
        _fold_weight_norm(self.network)

    @torch.inference_mode()
    def encode(self, waves: Sequence[Wave], batch_seconds: float = 10.0) -> list[Codes]:
        """Codes `[Q, ceil(samples / 320)]` of each waveform `[samples]`, in input order.

        A batch holds at most `batch_seconds` of padded audio.
        """
        frames = [-(-len(wave) // HOP) for wave in waves]
        result: list[Codes] = [np.empty((0, 0), np.int16)] * len(waves)
        for indices in batch_by_length(frames, int(batch_seconds * FRAME_RATE)):
            batch = torch.zeros(len(indices), 1, _padded(frames, indices) * HOP)
            for row, index in enumerate(indices):
                batch[row, 0, : len(waves[index])] = torch.tensor(waves[index])
            codes, _ = self.network.encode(batch.to(self.device))[0]
            stored = codes.to("cpu", torch.int16).numpy()
            for row, index in enumerate(indices):
                result[index] = stored[row, :, : frames[index]].copy()
        return result

    @torch.inference_mode()
    def decode(self, codes: Sequence[Codes], batch_seconds: float = 10.0) -> list[Wave]:
        """Waveforms `[T * 320]` of each `[Q, T]`, in input order.

        Raises ValueError for codes outside 0 .. 1023 or of a wrong shape.
        """
        for number, item in enumerate(codes):
            self.check(item, f"codes[{number}]")
        frames = [item.shape[1] for item in codes]
        result: list[Wave] = [np.empty(0, np.float32)] * len(codes)
        for indices in batch_by_length(frames, int(batch_seconds * FRAME_RATE)):
            n_codebooks = codes[indices[0]].shape[0]
            batch = torch.zeros(len(indices), n_codebooks, _padded(frames, indices)).long()
            for row, index in enumerate(indices):
                batch[row, :, : frames[index]] = torch.from_numpy(codes[index].astype(np.int64))
            waves = self.network.decode([(batch.to(self.device), None)])[:, 0].cpu().numpy()
            for row, index in enumerate(indices):
                result[index] = waves[row, : frames[index] * HOP].copy()
        return result

    def check(self, codes: Codes, name: str = "codes") -> None:
        """Raises ValueError for codes outside 0 .. 1023 or of a wrong shape."""
        if codes.ndim != 2 or not 1 <= codes.shape[0] <= N_CODEBOOKS:
            raise ValueError(f"{name}: expected [1..8, T], got {codes.shape}")
        if codes.size and not (codes.min() >= 0 and codes.max() < CODEBOOK_SIZE):
            raise ValueError(f"{name}: values must lie in 0 .. {CODEBOOK_SIZE - 1}")


def _padded(frames: Sequence[int], indices: Sequence[int]) -> int:
    """Frames of a padded batch, at least eight. The first convolutions mirror up to six frames at
    the start, so that a shorter item would depend on the padding of its batch."""
    return max(8, *(frames[index] for index in indices))


def _fold_weight_norm(model: nn.Module) -> None:
    """Folds weight normalisation into plain weights, which saves operations in each call."""
    for module in model.modules():
        if hasattr(module, "weight_g"):
            nn.utils.remove_weight_norm(module)


def save(model: "EncodecModel", config: EncodecConfig, folder: Path) -> None:
    """Writes `model.safetensors` (half precision, read back as float32) and `config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    # the moving averages of training would double the size of the codebooks
    weights = {
        name: value.half().contiguous()
        for name, value in model.state_dict().items()
        if not _is_training_only(name)
    }
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")


def _is_training_only(name: str) -> bool:
    return name.endswith(("_codebook.embed_avg", "_codebook.cluster_size", "_codebook.inited"))


def load(source: str = "nano", *, device: str = "cpu", cache: Path | None = None) -> Encodec:
    """The EnCodec `source`.

    `nano` ships with the repository; `encodec-24khz` is downloaded once into `cache` and verified
    by its SHA-256; a path is a folder written by `save`, or the official `.th` file. Raises
    ValueError or FileNotFoundError with the remedy.
    """
    if source == "encodec-24khz":
        if cache is None:
            raise ValueError("codec: encodec-24khz needs a folder to download into; pass `cache`")
        return _load_official(_download(cache), device)
    path = NANO_CODEC_FOLDER if source == "nano" else Path(source)
    if path.suffix == ".th":
        return _load_official(path, device)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"codec: no config.json in {path}; give nano, encodec-24khz, a folder or a .th file"
        )
    config = EncodecConfig(**json.loads((path / "config.json").read_text()))
    weights = load_file(path / "model.safetensors")
    return _assemble(config, weights, device)


def _load_official(path: Path, device: str) -> Encodec:
    weights = torch.load(path, map_location="cpu", weights_only=True)
    weights = {k: v for k, v in weights.items() if not _is_training_only(k)}
    return _assemble(EncodecConfig(), weights, device)


def _assemble(config: EncodecConfig, weights: dict[str, Tensor], device: str) -> Encodec:
    model = build(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not _is_training_only(name)]
    if missing or unexpected:
        raise ValueError(f"codec weights do not fit: missing {missing}, unexpected {unexpected}")
    identity = CodecIdentity(name=config.name, sha256=weights_hash(weights))
    return Encodec(model, identity, device)


def _download(cache: Path) -> Path:
    """Path of the official checkpoint in `cache`; downloads and verifies it if it is missing."""
    target = cache / OFFICIAL_URL.rsplit("/", 1)[1]
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        try:
            # into a temporary file, which is renamed when its hash is right
            torch.hub.download_url_to_file(OFFICIAL_URL, str(target), hash_prefix=OFFICIAL_SHA256)
        except OSError as error:
            raise FileNotFoundError(
                f"codec: cannot download {OFFICIAL_URL} ({error}); on a closed network put the "
                f"file at {target}, or name its path as the codec"
            ) from error
    with target.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != OFFICIAL_SHA256:
        raise ValueError(
            f"codec: {target} is not the official checkpoint (SHA-256 {digest[:16]}, expected "
            f"{OFFICIAL_SHA256[:16]}); delete it, and it is downloaded again"
        )
    return target

"""EnCodec 24 kHz: waveforms to residual codes and back, in batches of unequal lengths.

The networks are the classes of the `encodec` package. Two sets of weights: `encodec-24khz`, the
official checkpoint (downloaded once and checked, or read from a path), and `nano`, the same
architecture made narrow, which ships with the repository.

Codes are `int16 [Q, T]` everywhere outside a model, 75 frames a second, values 0 .. 1023.
"""

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
OFFICIAL_SHA256_PREFIX: Final = "d7cc33bc"
NANO_CODEC_FOLDER: Final = (
    Path(valle.__file__).resolve().parent.parent / "release" / "nano" / "codec"
)


@dataclass(frozen=True, kw_only=True)
class EncodecConfig:
    """Size of an EnCodec. The defaults are the official 24 kHz model's."""

    name: str = "encodec-24khz"
    """Part of the codec's identity."""

    n_filters: int = 32
    """Channels of the outermost convolution; they double at each of the four strides."""

    dimension: int = 128
    """Width of the quantised space."""

    lstm: int = 2
    """LSTM layers at the bottleneck; 0 leaves them out."""

    n_codebooks: int = 32
    """Codebooks the weights hold; the system uses the first 8."""


def build(config: EncodecConfig) -> "EncodecModel":
    """An untrained EnCodec of the given size, on the CPU."""
    ensure_torchaudio()
    from encodec.model import EncodecModel
    from encodec.modules import SEANetDecoder, SEANetEncoder
    from encodec.quantization import ResidualVectorQuantizer

    with warnings.catch_warnings():
        # the package uses the older spelling of weight normalisation
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
    """A trained codec on a device, ready for batches.

    All convolutions are causal and every input is padded to whole frames, so the padding that
    aligns a batch never reaches a frame that is kept: batched equals one by one.
    """

    def __init__(self, model: "EncodecModel", identity: CodecIdentity, device: str = "cpu") -> None:
        self.identity = identity
        self.device = torch.device(device)
        model.set_target_bandwidth(N_CODEBOOKS * 0.75)
        self.network = model.eval().requires_grad_(False).to(self.device)
        """The package's model, without weight normalisation."""
        _fold_weight_norm(self.network)

    @torch.inference_mode()
    def encode(self, waves: Sequence[Wave], batch_seconds: float = 10.0) -> list[Codes]:
        """Codes `[Q, ceil(samples / 320)]` of each waveform `[samples]`, in the order given.

        At most `batch_seconds` of padded audio goes through the network at once.
        """
        frames = [-(-len(wave) // HOP) for wave in waves]
        result: list[Codes] = [np.empty((0, 0), np.int16)] * len(waves)
        for group in batch_by_length(frames, int(batch_seconds * FRAME_RATE)):
            batch = torch.zeros(len(group), 1, _padded(frames, group) * HOP)
            for row, index in enumerate(group):
                batch[row, 0, : len(waves[index])] = torch.tensor(waves[index])
            codes, _ = self.network.encode(batch.to(self.device))[0]
            stored = codes.to("cpu", torch.int16).numpy()
            for row, index in enumerate(group):
                result[index] = stored[row, :, : frames[index]].copy()
        return result

    @torch.inference_mode()
    def decode(self, codes: Sequence[Codes], batch_seconds: float = 10.0) -> list[Wave]:
        """Waveforms `[T * 320]` of each `[Q, T]`, in the order given.

        Raises ValueError for codes outside 0 .. 1023 or of a wrong shape.
        """
        for number, item in enumerate(codes):
            self.check(item, f"codes[{number}]")
        frames = [item.shape[1] for item in codes]
        result: list[Wave] = [np.empty(0, np.float32)] * len(codes)
        for group in batch_by_length(frames, int(batch_seconds * FRAME_RATE)):
            n_codebooks = codes[group[0]].shape[0]
            batch = torch.zeros(len(group), n_codebooks, _padded(frames, group)).long()
            for row, index in enumerate(group):
                batch[row, :, : frames[index]] = torch.from_numpy(codes[index].astype(np.int64))
            waves = self.network.decode([(batch.to(self.device), None)])[:, 0].cpu().numpy()
            for row, index in enumerate(group):
                result[index] = waves[row, : frames[index] * HOP].copy()
        return result

    def check(self, codes: Codes, name: str = "codes") -> None:
        """Raises ValueError for codes outside 0 .. 1023 or of a wrong shape."""
        if codes.ndim != 2 or not 1 <= codes.shape[0] <= N_CODEBOOKS:
            raise ValueError(f"{name}: expected [1..8, T], got {codes.shape}")
        if codes.size and not (codes.min() >= 0 and codes.max() < CODEBOOK_SIZE):
            raise ValueError(f"{name}: values must lie in 0 .. {CODEBOOK_SIZE - 1}")


def _padded(frames: Sequence[int], group: Sequence[int]) -> int:
    """Frames of a padded batch. The first convolutions mirror up to six frames of the start, so
    a shorter item would depend on what it is batched with."""
    return max(8, *(frames[index] for index in group))


def _fold_weight_norm(model: nn.Module) -> None:
    """Multiplies weight normalisation into plain weights: fewer operations a call."""
    for module in model.modules():
        if hasattr(module, "weight_g"):
            nn.utils.remove_weight_norm(module)


def save(model: "EncodecModel", config: EncodecConfig, folder: Path) -> None:
    """Writes `model.safetensors` (half precision, read back as float32) and `config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    # training-only averages double the size of the codebooks and are no part of the codec
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
    """The codec named by `source`.

    `nano` ships with the repository; `encodec-24khz` is downloaded once into `cache` (SHA-256
    checked); a path is a folder written by `save`, or the official `.th` file. Raises ValueError
    or FileNotFoundError with what to do.
    """
    if source == "encodec-24khz":
        if cache is None:
            raise ValueError("codec: encodec-24khz needs a cache folder to download into")
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
    """The official checkpoint in `cache`, fetched if it is not there; its hash is checked."""
    target = cache / OFFICIAL_URL.rsplit("/", 1)[1]
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(
                OFFICIAL_URL, str(target), hash_prefix=OFFICIAL_SHA256_PREFIX
            )
        except OSError as error:
            raise FileNotFoundError(
                f"codec: cannot download {OFFICIAL_URL} ({error}); on a closed network put the "
                f"file at {target}, or name its path as the codec"
            ) from error
    return target

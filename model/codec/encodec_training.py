"""Training a narrow EnCodec: initialisation from data, taught latents, quantiser, losses.

Follows EnCodec (Défossez et al. 2022): multi-scale mel and waveform reconstruction plus
commitment (section 3.4), without the discriminators, which cost too much on a CPU. Three things
differ, because a small network trained on small batches otherwise codes loudness only:

- the convolutions are initialised from data;
- in the first steps the latents are taught: the encoder learns to compute log-mel features
  (`Teacher`), and the decoder learns to reconstruct speech from the same features, quantised. So
  the codebooks hold phonetic content before encoder and decoder are trained end to end;
- the codebooks' moving averages are updated here, with a dead-entry threshold for a few hundred
  vectors a step.

Inference uses the package's `EncodecModel`.

Shapes: B batch, D dimension of the latents, T frames, N = B * T vectors, Q codebooks.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from valle.model.tokens import CODEBOOK_SIZE, HOP, SAMPLE_RATE

if TYPE_CHECKING:
    from encodec.model import EncodecModel


FLOOR: Final = 1e-3
"""Added to mel magnitudes before the logarithm, about 45 dB below speech: limits the weight of the
noise in pauses."""


def _formerly(name: str) -> dict[str, tuple[str, ...]]:
    """Metadata of a renamed field, as `valle.platform.recipe.formerly`, which `model/` must not
    import."""
    return {"formerly": (name,)}


@dataclass(frozen=True, kw_only=True)
class EncodecLossConfig:
    """Weights of the loss terms, and the codebooks' moving averages."""

    mel: float = 1.0
    """Multi-scale log-mel distance."""

    waveform: float = 2.0
    """L1 distance of the waveforms, which fixes phase and the lowest frequencies."""

    commitment: float = 0.25
    """Mean square distance of the encoder's output to its codebook entries."""

    teacher: float = 1.0
    """Mean square distance of the encoder's output to the teacher's features, in the first
    `teacher_steps` steps."""

    anchor: float = 0.05
    """Weight of the same distance afterwards: bounds directions of the latents that the decoder
    ignores, which would otherwise grow and occupy the first codebooks."""

    ema_decay: float = field(default=0.98, metadata=_formerly("decay"))
    """Decay per step of the moving averages whose means are the codebook entries."""

    dead_threshold: float = field(default=0.05, metadata=_formerly("dead_below"))
    """An entry with a lower average count per step is replaced by a vector of the batch."""

    teacher_steps: int = field(default=1500, metadata=_formerly("taught_steps"))
    """First steps, in which the decoder's input is the teacher's features, quantised."""


class MelLoss(nn.Module):
    """L1 distance of log-mel spectrograms at several window lengths (EnCodec eq. 4, log terms)."""

    def __init__(self, windows: tuple[int, ...] = (128, 256, 512, 1024, 2048)) -> None:
        super().__init__()
        from librosa.filters import mel

        self.windows = windows
        for window in windows:
            bank = mel(sr=SAMPLE_RATE, n_fft=window, n_mels=max(8, window // 13))
            self.register_buffer(f"bank_{window}", torch.from_numpy(bank), persistent=False)
            self.register_buffer(f"hann_{window}", torch.hann_window(window), persistent=False)

    def forward(self, a: Float[Tensor, "B samples"], b: Float[Tensor, "B samples"]) -> Tensor:
        """Mean absolute difference, averaged over the window lengths."""
        total = a.new_zeros(())
        both = torch.cat([a, b])
        for window in self.windows:
            bank, hann = getattr(self, f"bank_{window}"), getattr(self, f"hann_{window}")
            spectrum = torch.stft(both, window, window // 4, window=hann, return_complex=True)
            magnitude = (spectrum.real.square() + spectrum.imag.square() + 1e-9).sqrt()
            mel = torch.log(bank @ magnitude + FLOOR)
            left, right = mel.chunk(2)
            total = total + F.l1_loss(left, right)
        return total / len(self.windows)


@torch.no_grad()
def init_convolutions(model: "EncodecModel", waves: Float[Tensor, "B samples"]) -> None:
    """Scales each convolution to unit deviation of its output on `waves`; the last one to less.

    With the default initialisation the encoder's output hardly depends on its input: the decoder
    then learns the mean spectrum and ignores the codes.
    """

    def rescale(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        deviation = output.std().clamp_min(1e-6)
        module.weight_g.div_(deviation)
        return output / deviation

    convolutions: list[Any] = [m for m in model.modules() if hasattr(m, "weight_g")]
    for convolution in convolutions:
        convolution.bias.zero_()
    hooks = [convolution.register_forward_hook(rescale) for convolution in convolutions]
    model.decoder(model.encoder(waves[:, None]))
    for hook in hooks:
        hook.remove()
    convolutions[-1].weight_g.mul_(0.05)


class Teacher(nn.Module):
    """The target of the latents: causal log-mel features, 75 frames a second.

    A short window follows the spectral envelope, a long one resolves the harmonics of a voice.
    Both end where the codec's causal frame ends and fall off late, so that a frame mostly
    describes its own samples.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, dimension: int) -> None:
        super().__init__()
        from librosa.filters import mel

        self.windows = (640, 1280)
        short = dimension * 3 // 8
        for window, bands, top in zip(
            self.windows, (short, dimension - short), (SAMPLE_RATE / 2, 5000.0), strict=True
        ):
            bank = mel(sr=SAMPLE_RATE, n_fft=window, n_mels=bands, fmax=top)
            rise, fall = torch.hann_window(2 * (window - 160)), torch.hann_window(2 * 160)
            shape = torch.cat([rise[: window - 160], fall[160:]])
            self.register_buffer(f"bank_{window}", torch.from_numpy(bank), persistent=False)
            self.register_buffer(f"window_{window}", shape, persistent=False)
        self.register_buffer("mean", torch.zeros(dimension))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def forward(self, waves: Float[Tensor, "B samples"]) -> Float[Tensor, "B D T"]:
        """Features of whole frames; over speech near zero mean and, together, unit variance."""
        features = []
        for window in self.windows:
            padded = F.pad(waves, (window - HOP, 0))
            frames = padded.unfold(1, window, HOP) * getattr(self, f"window_{window}")
            magnitude = torch.fft.rfft(frames).abs()
            features.append(torch.log(magnitude @ getattr(self, f"bank_{window}").T + FLOOR))
        return ((torch.cat(features, 2) - self.mean) / self.scale).transpose(1, 2)

    @torch.no_grad()
    def fit(self, waves: Float[Tensor, "B samples"]) -> None:
        """Sets the mean (per feature) and the scale (one for all features) from speech."""
        features = self(waves).transpose(1, 2).flatten(0, 1)
        self.mean.copy_(features.mean(0))
        self.scale.copy_((features - self.mean).square().mean().sqrt())


@torch.no_grad()
def init_codebooks(
    model: "EncodecModel", vectors: Float[Tensor, "N D"], per_step: int, seed: int = 0
) -> None:
    """Initialises each codebook by k-means over the residual of the codebooks before it.

    `per_step` is the number of vectors of a training step, the unit of the moving averages.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    residual = vectors
    for layer in model.quantizer.vq.layers:
        book = layer._codebook
        means = KMeans(CODEBOOK_SIZE, init="random", n_init=1, max_iter=20, random_state=seed)
        # its threads wait by spinning: more threads than free cores starve each other
        with threadpool_limits(torch.get_num_threads()):
            means.fit(residual.cpu().numpy())
        book.embed.copy_(torch.from_numpy(means.cluster_centers_))
        index = book.quantize(residual)
        counts = torch.bincount(index, minlength=CODEBOOK_SIZE).to(book.embed)
        book.cluster_size.copy_(counts * (per_step / len(residual)))
        book.embed_avg.copy_(book.embed * book.cluster_size[:, None])
        residual = residual - F.embedding(index, book.embed)


def residual_quantize(
    model: "EncodecModel",
    z: Float[Tensor, "B D T"],
    loss: EncodecLossConfig,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "B D T"], Int[Tensor, "Q N"], Tensor]:
    """Residual quantisation with a straight-through gradient; updates the codebooks.

    Returns the quantised features, the codes and the commitment loss. Counts and sums are added up
    over all workers, so that every worker has the same codebooks.
    """
    residual = z.transpose(1, 2).reshape(-1, z.shape[1])
    quantized = torch.zeros_like(residual)
    commitment = z.new_zeros(())
    codes = []
    for layer in model.quantizer.vq.layers:
        book = layer._codebook
        index = book.quantize(residual.detach())
        entry = F.embedding(index, book.embed)
        commitment = commitment + F.mse_loss(residual, entry)
        _update(book, residual.detach(), index, loss, generator)
        residual = residual - entry
        quantized = quantized + entry
        codes.append(index)
    quantized = quantized.view(z.shape[0], z.shape[2], -1).transpose(1, 2)
    return z + (quantized - z).detach(), torch.stack(codes), commitment / len(codes)


@torch.no_grad()
def _update(
    book: Any, vectors: Tensor, index: Tensor, loss: EncodecLossConfig, generator: torch.Generator
) -> None:
    """One moving-average step of a codebook; dead entries restart at vectors of the batch."""
    counts = torch.bincount(index, minlength=CODEBOOK_SIZE).float()
    sums = torch.zeros_like(book.embed).index_add_(0, index, vectors)
    rows = torch.randint(len(vectors), (CODEBOOK_SIZE,), generator=generator)
    fresh = vectors[rows]
    if dist.is_initialized():
        dist.all_reduce(counts)
        dist.all_reduce(sums)
        dist.broadcast(fresh, src=0)
    book.cluster_size.lerp_(counts, 1 - loss.ema_decay)
    book.embed_avg.lerp_(sums, 1 - loss.ema_decay)
    book.embed.copy_(book.embed_avg / book.cluster_size.clamp_min(1e-5)[:, None])
    # all three are reset, or the next average would pull a restarted entry back
    dead = book.cluster_size < loss.dead_threshold
    book.embed[dead] = fresh[dead]
    book.embed_avg[dead] = fresh[dead] * (2 * loss.dead_threshold)
    book.cluster_size[dead] = 2 * loss.dead_threshold


@dataclass(frozen=True)
class EncodecLoss:
    """Loss of a batch."""

    loss: Tensor
    """Weighted sum of the terms, a scalar."""

    terms: dict[str, Tensor]
    """Terms of the loss, and `entries_1` and `entries_8`: the number of entries that the batch used
    in the first and in the last codebook."""


class EncodecObjective(nn.Module):
    """The codec with its losses as one module.

    Its state is all of training: the codec with the codebooks' moving averages, and the teacher's
    statistics.
    """

    def __init__(self, model: "EncodecModel", loss: EncodecLossConfig) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.mel = MelLoss()
        self.teacher = Teacher(model.quantizer.dimension)

    @torch.no_grad()
    def initialize(self, waves: Float[Tensor, "B samples"], per_step: int, seed: int) -> None:
        """Initialises convolutions, teacher and codebooks from a few hundred crops of speech."""
        init_convolutions(self.model, waves[:16])
        self.teacher.fit(waves)
        vectors = self.teacher(waves).transpose(1, 2).flatten(0, 1)
        init_codebooks(self.model, vectors, per_step, seed)

    def forward(
        self, waves: Float[Tensor, "B samples"], step: int, generator: torch.Generator
    ) -> EncodecLoss:
        """Loss of a batch; `step`, counted from 0, decides whether the latents are still taught.

        `generator` draws the vectors that revive dead codebook entries.
        """
        # quantise the latents, or in the first steps the features that they are taught to be
        z = self.model.encoder(waves[:, None])
        features = self.teacher(waves)
        terms: dict[str, Tensor] = {"teacher": F.mse_loss(z, features)}
        # phase 1: the decoder learns from the teacher's features; phase 2: end to end
        has_teacher = step < self.loss.teacher_steps
        quantized, codes, terms["commitment"] = residual_quantize(
            self.model, features if has_teacher else z, self.loss, generator
        )
        # reconstruct, and weigh the terms
        output = self.model.decoder(quantized)[:, 0]
        terms["mel"] = self.mel(output, waves)
        terms["waveform"] = F.l1_loss(output, waves)
        total = self.loss.mel * terms["mel"]
        if has_teacher:
            total = total + self.loss.teacher * terms["teacher"]
        else:
            total = total + self.loss.anchor * terms["teacher"]
            total = total + self.loss.commitment * terms["commitment"]
            total = total + self.loss.waveform * terms["waveform"]
        terms["entries_1"] = codes[0].unique().numel() * torch.ones(())
        terms["entries_8"] = codes[-1].unique().numel() * torch.ones(())
        return EncodecLoss(total, {name: value.detach() for name, value in terms.items()})

"""Training a narrow EnCodec: initialisation, quantiser, losses and one step.

Follows EnCodec (Défossez et al. 2022): multi-scale mel and waveform reconstruction plus
commitment (section 3.4), without the discriminators, which do not pay on a CPU. Two things
differ because a small batch on a fresh network collapses otherwise: the convolutions are
initialised from data, and the quantiser's averages are kept here, with a dead-entry threshold
that fits a few hundred vectors a step. Inference stays the package's own `EncodecModel`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from valle.model.tokens import CODEBOOK_SIZE, SAMPLE_RATE

if TYPE_CHECKING:
    from encodec.model import EncodecModel


@dataclass(frozen=True, kw_only=True)
class CodecLoss:
    """Weights of the terms and the quantiser's habits."""

    mel: float = 1.0
    """Multi-scale log-mel distance."""

    waveform: float = 2.0
    """L1 between waveforms: keeps phase and the lowest frequencies honest."""

    commitment: float = 0.25
    """Pulls the encoder's output to its codebook entries."""

    feature_size: float = 0.05
    """Mean square of the encoder's output: keeps one direction from growing without bound, which
    costs the decoder nothing and the quantiser its first books."""

    decay: float = 0.98
    """Of the moving averages that place the codebook entries."""

    dead_below: float = 0.05
    """An entry whose average count per step falls below this moves to a vector of the batch."""

    autoencode_steps: int = 300
    """Steps without the quantiser at the start, until the encoder's output carries anything."""

    condition_at: tuple[int, ...] = (300,)
    """Steps at which the features are evened out (`condition`) and the codebooks start anew."""


class MelLoss(nn.Module):
    """L1 between log-mel spectrograms at several window lengths (EnCodec eq. 4, log terms)."""

    def __init__(self, windows: tuple[int, ...] = (128, 256, 512, 1024, 2048)) -> None:
        super().__init__()
        from librosa.filters import mel

        self.windows = windows
        for window in windows:
            bank = mel(sr=SAMPLE_RATE, n_fft=window, n_mels=max(8, window // 13))
            self.register_buffer(f"bank_{window}", torch.from_numpy(bank), persistent=False)
            self.register_buffer(f"hann_{window}", torch.hann_window(window), persistent=False)

    def forward(self, a: Float[Tensor, "B samples"], b: Float[Tensor, "B samples"]) -> Tensor:
        """Mean absolute difference, averaged over the scales."""
        total = a.new_zeros(())
        both = torch.cat([a, b])
        for window in self.windows:
            bank, hann = getattr(self, f"bank_{window}"), getattr(self, f"hann_{window}")
            spectrum = torch.stft(both, window, window // 4, window=hann, return_complex=True)
            magnitude = (spectrum.real.square() + spectrum.imag.square() + 1e-9).sqrt()
            mel = torch.log(bank @ magnitude + 1e-4)
            left, right = mel.chunk(2)
            total = total + F.l1_loss(left, right)
        return total / len(self.windows)


@torch.no_grad()
def init_from_data(model: "EncodecModel", waves: Float[Tensor, "B samples"]) -> None:
    """Scales each convolution so that its output has unit deviation on `waves`.

    With the default initialisation the encoder's output hardly varies with its input, the decoder
    learns the mean spectrum, and the codes never come to matter. The last layer is made small.
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


@torch.no_grad()
def condition(model: "EncodecModel", waves: Float[Tensor, "B samples"], power: float = 0.5) -> None:
    """Evens out the encoder's output before the quantiser joins; the autoencoder stays the same.

    After plain auto-encoding two directions of the features (loudness, mostly) carry a hundred
    times the variance of the others, and residual quantisation by distance would spend all books
    on them. Each principal direction is divided by its deviation to the `power`; the change is
    folded into the encoder's last and the decoder's first convolution, which are linear.
    """
    z = model.encoder(waves[:, None]).transpose(1, 2).flatten(0, 1)
    mean = z.mean(0)
    variances, axes = torch.linalg.eigh(torch.cov(z.T))
    variances = variances.clamp_min(variances.max() * 1e-6)
    scale = variances.pow(-power / 2)
    scale = scale / (variances * scale.square()).mean().sqrt()
    forth, back = (axes * scale) @ axes.T, (axes / scale) @ axes.T

    last, first = model.encoder.model[-1].conv.conv, model.decoder.model[0].conv.conv
    last_weight, first_weight = (
        torch._weight_norm(layer.weight_v, layer.weight_g, 0) for layer in (last, first)
    )
    last.bias.copy_(forth @ (last.bias - mean))
    first.bias.add_(first_weight.sum(2) @ mean)
    for layer in model.quantizer.vq.layers:
        layer._codebook.cluster_size.zero_()  # all dead: the next batch fills them
        layer._codebook.embed_avg.zero_()
    _set_weight(last, torch.einsum("oc,cik->oik", forth, last_weight))
    _set_weight(first, torch.einsum("ock,ci->oik", first_weight, back))


def _set_weight(layer: Any, weight: Tensor) -> None:
    """Gives a weight-normalised convolution the effective weight `weight`."""
    layer.weight_v.copy_(weight)
    layer.weight_g.copy_(weight.flatten(1).norm(dim=1)[:, None, None])


def quantise(
    model: "EncodecModel", z: Float[Tensor, "B D T"], loss: CodecLoss, generator: torch.Generator
) -> tuple[Float[Tensor, "B D T"], Int[Tensor, "Q N"], Tensor]:
    """Residual quantisation with moving-average updates, straight-through gradient.

    Returns the quantised features, the codes of the `N = B * T` vectors and the commitment loss.
    Counts and sums are added up over all workers, so every worker keeps the same codebooks.
    """
    residual = z.transpose(1, 2).reshape(-1, z.shape[1])
    quantised = torch.zeros_like(residual)
    commitment = z.new_zeros(())
    codes = []
    for layer in model.quantizer.vq.layers:
        book = layer._codebook
        index = book.quantize(residual.detach())
        entry = F.embedding(index, book.embed)
        commitment = commitment + F.mse_loss(residual, entry)
        _update(book, residual.detach(), index, loss, generator)
        residual = residual - entry
        quantised = quantised + entry
        codes.append(index)
    quantised = quantised.view(z.shape[0], z.shape[2], -1).transpose(1, 2)
    return z + (quantised - z).detach(), torch.stack(codes), commitment / len(codes)


@torch.no_grad()
def _update(
    book: Any, vectors: Tensor, index: Tensor, loss: CodecLoss, generator: torch.Generator
) -> None:
    """One moving-average step of a codebook; dead entries restart at vectors of the batch."""
    counts = torch.bincount(index, minlength=CODEBOOK_SIZE).float()
    sums = torch.zeros_like(book.embed).index_add_(0, index, vectors)
    chosen = torch.randint(len(vectors), (CODEBOOK_SIZE,), generator=generator)
    fresh = vectors[chosen]
    if dist.is_initialized():
        dist.all_reduce(counts)
        dist.all_reduce(sums)
        dist.broadcast(fresh, src=0)
    book.cluster_size.lerp_(counts, 1 - loss.decay)
    book.embed_avg.lerp_(sums, 1 - loss.decay)
    book.embed.copy_(book.embed_avg / book.cluster_size.clamp_min(1e-5)[:, None])
    # all three together, or the next average pulls a revived entry straight back
    dead = book.cluster_size < loss.dead_below
    book.embed[dead] = fresh[dead]
    book.embed_avg[dead] = fresh[dead] * (2 * loss.dead_below)
    book.cluster_size[dead] = 2 * loss.dead_below


class CodecTrainee(nn.Module):
    """The codec with its losses as one module: what DDP wraps."""

    def __init__(self, model: "EncodecModel", loss: CodecLoss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.mel = MelLoss()

    def forward(
        self, waves: Float[Tensor, "B samples"], step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch and its terms, with the share of entries used by each book."""
        z = self.model.encoder(waves[:, None])
        terms: dict[str, Tensor] = {"features": z.square().mean()}
        if step >= self.loss.autoencode_steps:
            z, codes, terms["commitment"] = quantise(self.model, z, self.loss, generator)
            terms["entries_1"] = codes[0].unique().numel() * torch.ones(())
            terms["entries_8"] = codes[-1].unique().numel() * torch.ones(())
        output = self.model.decoder(z)[:, 0]
        terms["mel"] = self.mel(output, waves)
        terms["waveform"] = F.l1_loss(output, waves)
        total = self.loss.mel * terms["mel"] + self.loss.waveform * terms["waveform"]
        total = total + self.loss.commitment * terms.get("commitment", z.new_zeros(()))
        total = total + self.loss.feature_size * terms["features"]
        return total, {name: value.detach() for name, value in terms.items()}

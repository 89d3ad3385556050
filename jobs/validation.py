"""What a training run checks at each checkpoint: held-out loss, accuracy, and samples to hear."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from valle.model.ar import AR
from valle.model.codec import Codec
from valle.model.nar import NAR
from valle.model.sampling import Sampling
from valle.model.sequence import Batch
from valle.model.training import Loss, Objective
from valle.platform import sampler
from valle.platform.sampler import Batching

if TYPE_CHECKING:
    from valle.jobs.train import Loader

MAX_SAMPLE_FRAMES = 600


@torch.inference_mode()
def run(
    model: AR | NAR, loader: "Loader", batching: Batching, device: torch.device
) -> dict[str, float]:
    """Loss and accuracy on the held-out utterances, per codebook, in evaluation mode.

    `validation/loss_wrong_text` is the loss with each text replaced by its neighbour's: the gap
    between the two says how much the model reads, long before one can hear it.
    """
    objective = Objective(model.eval())
    right: list[Loss] = []
    wrong: list[Loss] = []
    plan = sampler.plan(loader.lengths[loader.validation], batching, seed=0, epoch=0)
    rows = 0
    for number, chosen in enumerate(plan):
        batch = loader.batch(loader.validation[chosen], [0, number]).to(device)
        # all levels in turn: with few utterances, drawing them would leave some out
        level = (torch.arange(rows, rows + len(batch.frames)) % (model.config.n_codebooks - 1)) + 1
        rows += len(batch.frames)
        right.append(objective(batch, level.to(device)))
        wrong.append(objective(_swap_texts(batch), level.to(device)))
    metrics = {
        "validation/loss": _mean(right),
        "validation/loss_wrong_text": _mean(wrong),
    }
    tokens = torch.stack([r.tokens for r in right]).sum(0)
    correct = torch.stack([r.correct for r in right]).sum(0)
    first = 1 if isinstance(model, AR) else 2
    for offset, (hits, count) in enumerate(zip(correct.tolist(), tokens.tolist(), strict=True)):
        if count:
            metrics[f"validation/accuracy_codebook_{first + offset}"] = hits / count
    return metrics


def _mean(losses: list[Loss]) -> float:
    """Mean cross entropy per token over batches."""
    total = torch.stack([x.total for x in losses]).sum()
    return float(total / torch.stack([x.tokens for x in losses]).sum())


def _swap_texts(batch: Batch) -> Batch:
    """Each row with the next row's text."""
    return Batch(
        batch.phonemes.roll(1, 0), batch.phoneme_lengths.roll(1, 0),
        batch.prompt, batch.prompt_frames, batch.codes, batch.frames,
    )  # fmt: skip


def samples(
    model: AR | NAR, loader: "Loader", codec: Codec, count: int, device: torch.device
) -> list[tuple[str, NDArray[np.float32]]]:
    """Held-out sentences spoken by the model alone, beside their recordings' reconstruction.

    The AR model is heard through the first codebook only; the NAR model fills in the other seven
    of the true first codebook. So one hears which of the two is the weak one.
    """
    generator = torch.Generator(device).manual_seed(0)
    heard: list[tuple[str, NDArray[np.float32]]] = []
    for number in loader.validation[:count]:
        batch = loader.batch(np.array([number]), [0, int(number)]).to(device)
        if isinstance(model, AR):
            said = model.generate(
                batch.phonemes[0], batch.prompt[0], max_frames=MAX_SAMPLE_FRAMES,
                sampling=Sampling(top_p=0.9, repetition_threshold=0.1), generator=generator,
            )  # fmt: skip
            codes = said.codes[None]
        else:
            codes = model.generate(
                batch.phonemes[0], batch.prompt[0], batch.codes[0, 0],
                sampling=Sampling(temperature=0.0), generator=generator,
            )  # fmt: skip
        stored = codes.cpu().numpy().astype(np.int16)
        if stored.shape[1]:
            heard.append((f"{number}-model", codec.decode([stored])[0]))
        heard.append((f"{number}-recording", codec.decode([loader.dataset[int(number)].codes])[0]))
    return heard

"""Validation at a checkpoint: held-out loss and accuracy, samples, word error rate."""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from valle.jobs.evaluation.items import SET_NAMES, EvaluationItem, item_seed, load_items
from valle.jobs.evaluation.metrics import words
from valle.jobs.training import sampler
from valle.jobs.training.loader import Loader
from valle.jobs.training.objective import Loss, Objective
from valle.jobs.training.sampler import Batching
from valle.model.ar import AR
from valle.model.codec.interface import SpeechCodec, Wave
from valle.model.nar import NAR
from valle.model.nar_decoding import NARRequest, nar_decode
from valle.model.sequence import Batch
from valle.model.text import phoneme_ids
from valle.model.tokens import SAMPLE_RATE
from valle.model.valle import Synthesis, Synthesizer
from valle.platform import audio, checkpoint, storage
from valle.platform.recipe import formerly, location

MAX_SAMPLE_FRAMES = 600
"""Length limit of a sample by the AR model."""


@dataclass(frozen=True, kw_only=True)
class QuickCheck:
    """A small evaluation set, synthesised and transcribed during training."""

    recordings: str = field(metadata=location())
    """Folder or URI of the set's recordings."""

    items: str = field(default="quick", metadata=location(names=SET_NAMES))
    """Name of a set in `jobs/evaluation/sets`, or path to JSONL. Each item needs a `reference`."""

    every: int = 2000
    """Steps between checks, a multiple of `checkpoint_every`. The last step has one as well."""

    nar_checkpoint: str | None = field(default=None, metadata=location() | formerly("partner"))
    """NAR checkpoint or run that completes the AR model's codes; without one the AR model is not
    checked. The NAR model itself is checked on the recording's first codebook."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"quick_check.every: {self.every} is below 1")


@torch.inference_mode()
def validate(
    model: AR | NAR, loader: Loader, batching: Batching, device: torch.device
) -> dict[str, float]:
    """Loss, and accuracy per codebook, on the held-out utterances.

    `validation/loss_wrong_text` is the loss with each text replaced by that of the utterance next
    in length. The gap between the two losses measures how much the model uses the text, long
    before it is audible.
    """
    # every held-out utterance once, and a neighbour in length that lends its text
    objective = Objective(model.eval())
    losses: list[Loss] = []
    wrong_text_losses: list[Loss] = []
    plan = sampler.plan(loader.lengths[loader.validation], batching, seed=0, epoch=0)
    by_length = loader.validation[np.argsort(loader.lengths[loader.validation], kind="stable")]
    neighbor = dict(zip(by_length.tolist(), np.roll(by_length, 1).tolist(), strict=True))
    rows = 0
    for number, indices in enumerate(plan):
        utterances = loader.validation[indices]
        batch = loader.batch(utterances, [0, number]).to(device)
        others = np.array([neighbor[u] for u in utterances.tolist()])
        other = loader.batch(others, [0, number]).to(device)
        # all codebooks in turn: a draw would leave some out where utterances are few
        level = (torch.arange(rows, rows + len(batch.frames)) % (model.config.n_codebooks - 1)) + 1
        rows += len(batch.frames)
        losses.append(objective(batch, level.to(device)))
        wrong_text_losses.append(objective(_with_text_of(batch, other), level.to(device)))
    # means over tokens, not over batches
    metrics = {
        "validation/loss": _mean(losses),
        "validation/loss_wrong_text": _mean(wrong_text_losses),
    }
    tokens = torch.stack([r.tokens for r in losses]).sum(0)
    correct = torch.stack([r.correct for r in losses]).sum(0)
    first = 1 if isinstance(model, AR) else 2
    for offset, (hits, count) in enumerate(zip(correct.tolist(), tokens.tolist(), strict=True)):
        if count:
            metrics[f"validation/accuracy_codebook_{first + offset}"] = hits / count
    return metrics


def _mean(losses: list[Loss]) -> float:
    """Mean cross entropy per token over batches."""
    total = torch.stack([x.loss_sum for x in losses]).sum()
    return float(total / torch.stack([x.tokens for x in losses]).sum())


def _with_text_of(batch: Batch, other: Batch) -> Batch:
    """Each row with the text of the same row of `other`."""
    return replace(batch, phonemes=other.phonemes, phoneme_lengths=other.phoneme_lengths)


def generate_samples(
    model: AR | NAR, loader: Loader, codec: SpeechCodec, count: int, device: torch.device
) -> list[tuple[str, NDArray[np.float32]]]:
    """Held-out sentences by this model alone, each with its recording's reconstruction.

    The AR model's first codebook is decoded without the others; the NAR model completes the
    recording's first codebook. So a fault is audible in the model that has it.
    """
    synthesis = Synthesis()
    samples: list[tuple[str, NDArray[np.float32]]] = []
    for number in loader.validation[:count]:
        batch = loader.batch(np.array([number]), [0, int(number)]).to(device)
        if isinstance(model, AR):
            output = model.generate(
                batch.phonemes[0], batch.prompt[0], max_frames=MAX_SAMPLE_FRAMES,
                sampling=synthesis.ar, seed=int(number),
            )  # fmt: skip
            codes = output.codes[None]
        else:
            codes = model.generate(
                batch.phonemes[0], batch.prompt[0], batch.codes[0, 0],
                sampling=synthesis.nar, seed=int(number),
            )  # fmt: skip
        stored = codes.cpu().numpy().astype(np.int16)
        if stored.shape[1]:
            samples.append((f"{number}-model", codec.decode([stored])[0]))
        samples.append(
            (f"{number}-recording", codec.decode([loader.dataset[int(number)].codes])[0])
        )
    return samples


def word_error_rate(model: AR | NAR, codec: SpeechCodec, check: QuickCheck) -> dict[str, float]:
    """Word error rate on the quick set, transcribed by whisper tiny.en.

    Empty for an AR model without `nar_checkpoint`.
    """
    if isinstance(model, AR) and check.nar_checkpoint is None:
        return {}
    nar = (
        _load_nar(check.nar_checkpoint, codec)
        if isinstance(model, AR) and check.nar_checkpoint
        else None
    )
    recognizer = words.Whisper()
    items = load_items(check.items)
    waves = [_synthesize(model, nar, codec, check, item) for item in items]
    hypotheses = [
        recognizer.transcribe(wave) if len(wave) > SAMPLE_RATE // 5 else "" for wave in waves
    ]
    return {checkpoint.WORD_ERROR_RATE: words.word_error_rate([i.text for i in items], hypotheses)}


def _load_nar(uri: str, codec: SpeechCodec) -> NAR:
    model = checkpoint.load_from_uri(uri, codec.identity)
    if not isinstance(model, NAR):
        raise ValueError(f"quick_check.nar_checkpoint: {uri} holds no NAR model")
    return model.to(codec.device)


def _synthesize(
    model: AR | NAR,
    nar: NAR | None,
    codec: SpeechCodec,
    check: QuickCheck,
    item: EvaluationItem,
) -> Wave:
    """One item: by both models, or by NAR from the reference's first codebook."""

    def read(name: str) -> Wave:
        path = storage.join(check.recordings, name)
        return audio.read(storage.read_bytes(path), max_seconds=60)

    synthesis = replace(Synthesis(), language=item.language, seed=item_seed(item.id, 0))
    if isinstance(model, AR):
        assert nar is not None, "word_error_rate() has loaded it"
        synthesizer = Synthesizer(model, nar, codec)
        return synthesizer.synthesize(item.text, read(item.prompt), synthesis).wave
    if item.reference is None:
        raise ValueError(f"quick_check.items: {item.id} has no reference")
    prompt, reference = codec.encode([read(item.prompt), read(item.reference)])
    prompt = prompt[:, : codec.identity.frames(synthesis.prompt_seconds)]
    nar_request = NARRequest(phoneme_ids(item.text, item.language), prompt, reference[0])
    codes = nar_decode(model, nar_request, synthesis.nar_decoding)
    return codec.decode([codes])[0]

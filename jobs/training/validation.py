"""What a training run checks at each checkpoint: held-out loss, accuracy, samples, and words."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from valle.jobs.evaluation.items import EvaluationItem, item_seed, load_items
from valle.jobs.evaluation.metrics import recogniser
from valle.jobs.training import sampler
from valle.jobs.training.loader import Loader
from valle.jobs.training.objective import Loss, Objective
from valle.jobs.training.sampler import Batching
from valle.model.ar import AR
from valle.model.codec.interface import SpeechCodec, Wave
from valle.model.nar import NAR
from valle.model.nar_decoding import Unfilled, fill_in
from valle.model.sequence import Batch
from valle.model.tokens import SAMPLE_RATE
from valle.model.valle import Synthesis, Voice, text_ids
from valle.platform import audio, checkpoint, storage

MAX_SAMPLE_FRAMES = 600


@dataclass(frozen=True, kw_only=True)
class QuickCheck:
    """A small evaluation set that is spoken and read back while training goes on."""

    recordings: str
    """Folder or URI that the set's recordings lie under."""

    items: str = "quick"
    """Name of a set in `jobs/evaluation/sets`, or path to JSONL. Every item needs a reference."""

    every: int = 2000
    """Steps between checks, a multiple of `checkpoint_every`; the last step is checked too."""

    partner: str | None = None
    """NAR checkpoint, or run, through which the AR model is heard. The NAR model needs none: it
    gets the true first codebook."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"quick_check.every: {self.every} is below 1")


@torch.inference_mode()
def run(
    model: AR | NAR, loader: Loader, batching: Batching, device: torch.device
) -> dict[str, float]:
    """Loss and accuracy on the held-out utterances, per codebook, in evaluation mode.

    `validation/loss_wrong_text` is the loss with each text replaced by that of the utterance next
    in length: the gap between the two says how much the model reads, long before one can hear it.
    """
    objective = Objective(model.eval())
    right: list[Loss] = []
    wrong: list[Loss] = []
    plan = sampler.plan(loader.lengths[loader.validation], batching, seed=0, epoch=0)
    by_length = loader.validation[np.argsort(loader.lengths[loader.validation], kind="stable")]
    neighbour = dict(zip(by_length.tolist(), np.roll(by_length, 1).tolist(), strict=True))
    rows = 0
    for number, chosen in enumerate(plan):
        utterances = loader.validation[chosen]
        batch = loader.batch(utterances, [0, number]).to(device)
        others = np.array([neighbour[u] for u in utterances.tolist()])
        other = loader.batch(others, [0, number]).to(device)
        # all levels in turn: with few utterances, drawing them would leave some out
        level = (torch.arange(rows, rows + len(batch.frames)) % (model.config.n_codebooks - 1)) + 1
        rows += len(batch.frames)
        right.append(objective(batch, level.to(device)))
        wrong.append(objective(_with_text_of(batch, other), level.to(device)))
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


def _with_text_of(batch: Batch, other: Batch) -> Batch:
    """Each row with the text of the same row of `other`."""
    return replace(batch, phonemes=other.phonemes, phoneme_lengths=other.phoneme_lengths)


def samples(
    model: AR | NAR, loader: Loader, codec: SpeechCodec, count: int, device: torch.device
) -> list[tuple[str, NDArray[np.float32]]]:
    """Held-out sentences spoken by the model alone, beside their recordings' reconstruction.

    The AR model is heard through the first codebook only; the NAR model fills in the other seven
    of the true first codebook. So one hears which of the two is the weak one.
    """
    generator, how = torch.Generator(device).manual_seed(0), Synthesis()
    heard: list[tuple[str, NDArray[np.float32]]] = []
    for number in loader.validation[:count]:
        batch = loader.batch(np.array([number]), [0, int(number)]).to(device)
        if isinstance(model, AR):
            said = model.generate(
                batch.phonemes[0], batch.prompt[0], max_frames=MAX_SAMPLE_FRAMES,
                sampling=how.ar, generator=generator,
            )  # fmt: skip
            codes = said.codes[None]
        else:
            codes = model.generate(
                batch.phonemes[0], batch.prompt[0], batch.codes[0, 0],
                sampling=how.nar, generator=generator,
            )  # fmt: skip
        stored = codes.cpu().numpy().astype(np.int16)
        if stored.shape[1]:
            heard.append((f"{number}-model", codec.decode([stored])[0]))
        heard.append((f"{number}-recording", codec.decode([loader.dataset[int(number)].codes])[0]))
    return heard


def words(model: AR | NAR, codec: SpeechCodec, chosen: QuickCheck) -> dict[str, float]:
    """Word error rate on the quick set, by whisper tiny.en; nothing for an AR model that has no
    partner to be heard through."""
    if isinstance(model, AR) and chosen.partner is None:
        return {}
    partner = (
        _load_partner(chosen.partner, codec) if isinstance(model, AR) and chosen.partner else None
    )
    reader = recogniser.Whisper()
    items = load_items(chosen.items)
    waves = [_say(model, partner, codec, chosen, item) for item in items]
    heard = [reader.transcribe(wave) if len(wave) > SAMPLE_RATE // 5 else "" for wave in waves]
    return {checkpoint.WORD_ERROR_RATE: recogniser.word_error_rate([i.text for i in items], heard)}


def _load_partner(uri: str, codec: SpeechCodec) -> NAR:
    model = checkpoint.load_from(storage.absolute(uri), codec.identity)
    if not isinstance(model, NAR):
        raise ValueError(f"quick_check.partner: {uri} holds no NAR model")
    return model.to(codec.device)


def _say(
    model: AR | NAR,
    partner: NAR | None,
    codec: SpeechCodec,
    chosen: QuickCheck,
    item: EvaluationItem,
) -> Wave:
    """One item: by both models, or by the NAR model on the reference's first codebook."""

    def read(name: str) -> Wave:
        path = storage.join(chosen.recordings, name)
        return audio.read(storage.read_bytes(path), max_seconds=60)

    how = replace(Synthesis(), language=item.language, seed=item_seed(item.id, 0))
    if isinstance(model, AR):
        assert partner is not None, "words() has loaded it"
        return Voice(model, partner, codec).speak(item.text, read(item.prompt), how).wave
    if item.reference is None:
        raise ValueError(f"quick_check.items: {item.id} has no reference")
    prompt, truth = codec.encode([read(item.prompt), read(item.reference)])
    prompt = prompt[:, : codec.identity.frames(how.prompt_seconds)]
    unfilled = Unfilled(text_ids(item.text, item.language), prompt, truth[0])
    codes = fill_in(model, unfilled, how.filling)
    return codec.decode([codes])[0]

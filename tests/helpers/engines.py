"""Engines over tiny models, requests, and `AR.generate` as the reference."""

from dataclasses import replace

import numpy as np
import torch

from helpers.tiny_models import TINY_AR, perturb, random_items, tiny_ar
from valle.model.ar import AR
from valle.model.sampling import Sampling
from valle.model.tokens import EOS
from valle.serve.engine.engine import Engine
from valle.serve.engine.request import FinishReason, Request, StepOutput
from valle.serve.engine.runner import Runner
from valle.serve.engine.scheduler import Scheduler

SAMPLINGS = [
    Sampling(top_p=0.9, repetition_threshold=0.1),
    Sampling(temperature=0.0),
    Sampling(temperature=0.7, top_k=20),
    Sampling(repetition_threshold=0.2, repetition_window=4),
    Sampling(top_p=0.9, guidance_scale=1.5),
    Sampling(temperature=0.0, guidance_scale=3.0),
]


def short_ar(group: int) -> AR:
    """A model of random weights that draws EOS after one to a few dozen frames."""
    model = tiny_ar(config=replace(TINY_AR, group_size=group))
    perturb(model, 0.5)
    model.head.bias.data[EOS] += 6.5
    return model


def request(number: int, max_frames: int = 40) -> Request:
    phonemes, prompt, _ = random_items(12 + 3 * number, seed=number)[0]
    return Request(
        id=f"r{number}",
        phonemes=phonemes.tolist(),
        prompt=prompt.numpy().astype(np.int16),
        sampling=SAMPLINGS[number % len(SAMPLINGS)],
        max_frames=max_frames,
        seed=number,
    )


def build_engine(
    model: AR, slots: int, *, guided: bool = True, compiled: bool = False, prefill_chunk: int = 16
) -> Engine:
    """The requests of the tests have 14 to 44 positions: most need several prefill chunks."""
    runner = Runner(
        model,
        slots=slots,
        max_positions=400,
        guided=guided,
        compiled=compiled,
        prefill_chunk=prefill_chunk,
    )
    return Engine(runner, Scheduler(slots))


def generate_alone(model: AR, request: Request) -> tuple[list[int], FinishReason]:
    """Codes and finish reason of `AR.generate`, one request at a time."""
    output = model.generate(
        torch.tensor(request.phonemes),
        torch.from_numpy(request.prompt.astype(np.int64)),
        sampling=request.sampling,
        max_frames=request.max_frames,
        seed=request.seed,
    )
    return output.codes.tolist(), FinishReason.LENGTH if output.hit_limit else FinishReason.STOP


def collect(
    outputs: list[StepOutput], codes: dict[str, list[int]], ends: dict[str, FinishReason]
) -> None:
    for output in outputs:
        assert output.request_id not in ends, "an output after the last one"
        codes.setdefault(output.request_id, []).extend(output.codes)
        if output.finish_reason is not None:
            ends[output.request_id] = output.finish_reason

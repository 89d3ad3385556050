"""The golden numbers and tokens of committed weights: what a change of code must not change."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.tiny_models import TINY_AR, TINY_NAR, random_items
from valle.jobs.training.augmentation import draw_levels
from valle.jobs.training.objective import Objective
from valle.jobs.training.optimizer import Optimization, build_optimizer
from valle.model.ar import AR
from valle.model.nar import NAR
from valle.model.sampling import Sampling
from valle.model.sequence import collate
from valle.model.tokens import EOS

GOLDEN = Path(__file__).parent.parent / "golden"

# The golden models find a thousand codes almost equally likely. Low temperatures leave a few, so
# that the last bit of a logit, which differs between processors, decides no token.
AR_SAMPLINGS = {
    "greedy": Sampling(temperature=0.0),
    "sampled": Sampling(temperature=0.05),
    "top_k_top_p": Sampling(temperature=0.1, top_k=8, top_p=0.9),
    "repetition_aware": Sampling(
        temperature=0.05, top_p=0.8, repetition_threshold=0.1, repetition_window=8
    ),
    "guided": Sampling(temperature=0.1, top_k=8, guidance_scale=1.5, repetition_threshold=0.2),
}
NAR_SAMPLINGS = {
    "greedy": Sampling(temperature=0.0),
    "sampled": Sampling(temperature=0.1, top_k=8),
    "guided": Sampling(temperature=0.1, top_k=8, guidance_scale=1.5),
}
NAR_GUIDED_LEVELS = 2
MAX_FRAMES = 40
EOS_BIAS = {1: 0.3, 2: 0.15}
"""By group: some streams end before the limit."""
SEED = 6


def golden_weights(kind: str) -> dict[str, Tensor]:
    weights = load_file(GOLDEN / f"{kind}.safetensors")
    return {name: value.float() for name, value in weights.items()}


def golden_run(kind: str) -> dict[str, Tensor]:
    """Logits of the committed weights, and the losses of 100 training steps from them."""
    model = AR(TINY_AR) if kind == "ar" else NAR(TINY_NAR)
    model.load_state_dict(golden_weights(kind))
    items = random_items(18, 25, seed=5)
    batch = collate(*zip(*items, strict=True))
    level = torch.tensor([2, 6])
    logits = model.eval()(batch) if kind == "ar" else model.eval()(batch, level)
    optimizer = build_optimizer(model, Optimization())
    objective = Objective(model).train()
    losses = []
    for step in range(100):
        loss = objective(batch, draw_levels(2, 8, f"golden/{step}")).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {"logits": logits.detach()[:, :4, :32].contiguous(), "losses": torch.stack(losses)}


def golden_tokens(dtype: torch.dtype = torch.float32, noise: float = 0.0) -> dict[str, Tensor]:
    """Codes that the committed weights generate, by model and sampling.

    `noise` is relative, on every weight: a little of it must not change the tokens.
    """
    phonemes, prompt, codes = random_items(24, seed=6)[0]
    generator = torch.Generator().manual_seed(0)

    def prepare(model: AR | NAR) -> None:
        for parameter in model.eval().parameters():
            random = torch.randn(parameter.shape, generator=generator)
            parameter.data *= 1 + noise * random
        model.to(dtype)

    tokens = {}
    for group in (1, 2):
        ar = grouped_ar(group)
        prepare(ar)
        for name, sampling in AR_SAMPLINGS.items():
            output = ar.generate(
                phonemes, prompt, sampling=sampling, max_frames=MAX_FRAMES, seed=SEED
            )
            tokens[f"ar/group {group}/{name}"] = output.codes
    nar = NAR(TINY_NAR)
    nar.load_state_dict(golden_weights("nar"))
    prepare(nar)
    for name, sampling in NAR_SAMPLINGS.items():
        tokens[f"nar/{name}"] = nar.generate(
            phonemes,
            prompt,
            codes[0],
            sampling=sampling,
            guided_levels=NAR_GUIDED_LEVELS,
            seed=SEED,
        )
    return {name: value.to(torch.int16) for name, value in tokens.items()}


def grouped_ar(group: int) -> AR:
    """The golden AR model, with groups of frames made of weights that it has; EOS is likely enough
    to end some streams before the limit."""
    weights = golden_weights("ar")
    weights["head.bias"][EOS] += EOS_BIAS[group]
    model = AR(replace(TINY_AR, group_size=group))
    if group > 1:
        books = weights["prompt_embedding.tables"]
        weights["code_embedding.tables"] = books[:group]
        weights["within.codes.tables"] = books[-(group - 1) :]
        wide, narrow = "transformer.blocks.0.ffn.0", "transformer.blocks.0.ffn.2"
        for name, value in model.within.mix.state_dict().items():
            layer, kind = name.split(".")
            source = {"1": wide, "3": narrow}.get(layer)
            weights[f"within.mix.{name}"] = (
                value
                if source is None
                else weights[f"{source}.{kind}"][tuple(slice(n) for n in value.shape)]
            )
    model.load_state_dict(weights)
    return model

"""The golden numbers of committed weights: what a change of code must not change."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from helpers.tiny_models import TINY, random_items
from valle.jobs.training.augmentation import draw_levels
from valle.jobs.training.objective import Objective
from valle.jobs.training.optimizer import Optimization, build_optimizer
from valle.model.ar import AR
from valle.model.nar import NAR
from valle.model.sequence import collate

GOLDEN = Path(__file__).parent.parent / "golden"


def golden_run(kind: str) -> dict[str, torch.Tensor]:
    """Logits of the committed weights, and the losses of 100 training steps from them."""
    model = (AR if kind == "ar" else NAR)(TINY)
    weights = load_file(GOLDEN / f"{kind}.safetensors")
    model.load_state_dict({name: value.float() for name, value in weights.items()})
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

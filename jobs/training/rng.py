"""The state of torch's global random generators as text, for a checkpoint's JSON."""

import base64

import numpy as np
import torch


def capture(device: torch.device) -> dict[str, str]:
    """State of the CPU's generator, and of the GPU's if `device` is one, in base64."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {
        name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()
    }


def restore(states: dict[str, str], device: torch.device) -> None:
    """Sets the generators that `states` has; a GPU's state is ignored on a CPU."""
    for name, text in states.items():
        state = torch.from_numpy(np.frombuffer(base64.b64decode(text), np.uint8).copy())
        if name == "cpu":
            torch.set_rng_state(state)
        elif device.type == "cuda":
            torch.cuda.set_rng_state(state, device)

"""Writes golden files: `python -m helpers.make_golden tokens` in `tests/`.

Run it only for a change that must change them, and state that in the commit. Each argument writes
its own files: `weights` (from which the others follow), `numbers` (logits and losses), `tokens`.
"""

import argparse

import torch
from safetensors.torch import save_file

from helpers.golden import GOLDEN, golden_run, golden_tokens
from helpers.tiny_models import perturb, tiny_ar, tiny_nar


def write_weights() -> None:
    for kind, model in (("ar", tiny_ar()), ("nar", tiny_nar())):
        perturb(model)
        weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
        save_file(weights, GOLDEN / f"{kind}.safetensors")


def write_numbers() -> None:
    for kind in ("ar", "nar"):
        save_file(golden_run(kind), GOLDEN / f"{kind}_expected.safetensors")


def write_tokens() -> None:
    """Refuses tokens that rounding decides: another processor would generate other ones."""
    tokens = golden_tokens()
    for variant in (golden_tokens(torch.float64), golden_tokens(noise=1e-5)):
        unstable = [name for name, codes in tokens.items() if not torch.equal(codes, variant[name])]
        if unstable:
            raise SystemExit(f"{unstable}: rounding changes these tokens; choose another SEED")
    save_file(tokens, GOLDEN / "tokens.safetensors")


WRITERS = {"weights": write_weights, "numbers": write_numbers, "tokens": write_tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", choices=WRITERS)
    for name in parser.parse_args().files:
        WRITERS[name]()


if __name__ == "__main__":
    main()

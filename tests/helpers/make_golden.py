"""Writes the golden weights and numbers: `python -m helpers.make_golden` in `tests/`.

Run it only when a change is meant to change them, and say so in the commit.
"""

from safetensors.torch import save_file

from helpers.golden import GOLDEN, golden_run
from helpers.tiny_models import perturb, tiny_ar, tiny_nar


def main() -> None:
    for kind, model in (("ar", tiny_ar()), ("nar", tiny_nar())):
        perturb(model)
        weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
        save_file(weights, GOLDEN / f"{kind}.safetensors")
        save_file(golden_run(kind), GOLDEN / f"{kind}_expected.safetensors")


if __name__ == "__main__":
    main()

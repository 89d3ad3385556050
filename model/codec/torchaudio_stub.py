"""An empty torchaudio for packages that import it without using it."""

import sys
import types


def ensure_torchaudio() -> None:
    """Registers an empty `torchaudio` module if the real one cannot be loaded.

    `encodec` and `distillmos` import torchaudio at their top and use nothing of it on our path.
    PyPI's torchaudio does not load beside a CPU build of torch (it needs libc10_cuda.so).
    """
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):
        stand_in = types.ModuleType("torchaudio")
        transforms = types.ModuleType("torchaudio.transforms")
        transforms.MFCC = None  # type: ignore[attr-defined]
        stand_in.transforms = transforms  # type: ignore[attr-defined]
        sys.modules |= {"torchaudio": stand_in, "torchaudio.transforms": transforms}

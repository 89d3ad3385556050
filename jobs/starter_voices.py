"""Records two voices for an endpoint that has none: joe and heart, spoken by installed packages.

python -m valle.jobs.starter_voices --voices data/voices
"""

import argparse
from collections.abc import Sequence

from valle.jobs.speakers import Heart, Joe
from valle.platform import audio, storage

TEXT = "The early train was late again, so we walked along the river and talked."


def make_starter_voices(folder: str) -> bool:
    """Writes `joe.wav` and `heart.wav` into a folder or URI without a wav; False: it had one."""
    if any(True for _ in storage.list_files(folder, (".wav",))):
        return False
    for name, engine in (("joe", Joe()), ("heart", Heart())):
        wave = engine.synthesize(TEXT, name, "en-us")
        storage.write_bytes(storage.join(folder, f"{name}.wav"), audio.wav_bytes(wave))
    return True


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: see above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--voices", default="data/voices", help="folder or URI of the recordings (%(default)s)"
    )
    folder = storage.absolute(parser.parse_args(argv).voices)
    print(f"{folder}: " + ("joe, heart" if make_starter_voices(folder) else "has voices already"))


if __name__ == "__main__":
    main()

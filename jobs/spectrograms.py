"""Draws log-mel spectrograms of recordings, one below the other, as a PNG.

python -m valle.jobs.spectrograms prompt.wav output.wav reference.wav --out picture.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from valle.platform import audio
from valle.platform.spectrogram import spectrograms_png

MAX_SECONDS = 60.0
"""Seconds; a longer recording is an error."""


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `python -m valle.jobs.spectrograms`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recordings", nargs="+", help="files or URIs, from top to bottom")
    parser.add_argument("--titles", nargs="+", help="a title for each; default: its path or URI")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    arguments = parser.parse_args(argv)
    titles = arguments.titles or arguments.recordings
    if len(set(titles)) != len(arguments.recordings):
        parser.error("--titles: expected a title for each recording, no two alike")
    try:
        waves = {
            title: audio.read_file(uri, max_seconds=MAX_SECONDS)
            for title, uri in zip(titles, arguments.recordings, strict=True)
        }
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    arguments.out.write_bytes(spectrograms_png(waves))
    print(arguments.out)


if __name__ == "__main__":
    main()

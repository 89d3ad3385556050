"""Pictures: curves of training runs in MLflow, and spectrograms of recordings."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from valle.jobs import curves, spectrograms
from valle.platform import tracking
from valle.platform.audio import wav_bytes


def test_training_hours_leaves_out_pauses() -> None:
    clock = [10.0, 10.1, 10.2, 15.0, 15.1]
    history = [(10.1, 3.0), (15.0, 2.0), (15.1, 1.0)]
    curve = curves.training_hours(history, clock)
    assert [value for _, value in curve] == [3.0, 2.0, 1.0]
    assert [time for time, _ in curve] == pytest.approx([0.1, 0.2, 0.3])


def test_main_draws_curves_from_mlflow(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import mlflow

    with tracking.driver_run("tiny-ar", {}) as run_id:
        for step in range(3):
            mlflow.log_metric("train/loss", 3.0 - step, step=step, run_id=run_id)
        mlflow.log_metric("validation/wer", 0.5, step=2, run_id=run_id)
    history = tracking.metric_history("tiny-ar", "train/loss")
    assert [value for _, value in history] == [3.0, 2.0, 1.0]
    out = home / "curves.png"
    curves.main(["tiny-ar", "--out", str(out)])
    assert out.read_bytes().startswith(b"\x89PNG") and str(out) in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_error:
        curves.main(["nobody", "--out", str(out)])
    assert exit_error.value.code == 2
    assert "no run 'nobody' with metrics" in capsys.readouterr().err


def test_spectrograms_are_drawn_one_below_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heights = []
    for count in (1, 3):
        paths = [str(tmp_path / f"{number}.wav") for number in range(count)]
        for number, path in enumerate(paths):
            tone = 0.3 * np.sin(0.1 * (number + 1) * np.arange(9_000))
            Path(path).write_bytes(wav_bytes(tone.astype(np.float32)))
        out = tmp_path / f"{count}.png"
        spectrograms.main([*paths, "--out", str(out)])
        heights.append(image.imread(out).shape[0])
    assert heights[1] == 3 * heights[0]
    with pytest.raises(SystemExit):
        spectrograms.main([paths[0], paths[0], "--out", str(out)])
    assert "no two alike" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        spectrograms.main([str(tmp_path / "none.wav"), "--out", str(out)])
    assert "none.wav" in capsys.readouterr().err

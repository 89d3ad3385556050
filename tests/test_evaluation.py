"""Scores, the report, the gate, and a sharded evaluation against a single one."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_bundles import save_checkpoints
from helpers.token_datasets import write_dataset

from valle.jobs import model_versions
from valle.jobs.evaluate import EvaluateRecipe, evaluate
from valle.jobs.evaluation import scores
from valle.jobs.evaluation.gate import Bound, violations
from valle.jobs.evaluation.items import SETS, EvaluationItem, check_unseen, item_seed, load_items
from valle.jobs.evaluation.metrics.speaker_similarity import equal_error_rate, load_speaker_encoder
from valle.jobs.evaluation.metrics.words import count_edits, load_recognizer, word_error_rate
from valle.jobs.publish import GateError, PublishRecipe, publish
from valle.jobs.speakers import Espeak
from valle.model.codec.encodec import Encodec
from valle.platform import audio, registry, storage
from valle.platform.resources import Placement


def test_error_rates_compare_words_not_spelling() -> None:
    errors = count_edits("Dr. Smith's colour is twenty-one.", "doctor smith's color is 21")
    assert errors.word_errors == 0
    errors = count_edits("the cat sat down", "the bat sat")
    assert (errors.words, errors.word_errors) == (4, 2)
    assert word_error_rate(["good", "bad dog"], ["good", "bad"]) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="nothing to compare"):
        count_edits("...", "hello")


def test_repetitions_are_found_whatever_their_period() -> None:
    generator = np.random.default_rng(0)
    natural = generator.integers(0, 1024, 300).astype(np.int16)
    assert scores.longest_repetition(natural) < 5
    for period in (1, 7, 75):
        looped = natural.copy()
        looped[100:250] = np.resize(natural[100 : 100 + period], 150)
        assert scores.longest_repetition(looped) >= 150 - period
    assert scores.faults(looped, False)["looped"] is False  # 75 frames of 75 again: not yet
    looped[100:300] = np.resize(natural[:3], 200)
    assert scores.faults(looped, True) == {"hit_limit": True, "stopped": False, "looped": True}
    assert scores.faults(None, False)["stopped"] and scores.faults(natural[:5], False)["stopped"]


def item_result(
    number: int, errors: int = 0, speaker: str = "a", **more: object
) -> scores.ItemResult:
    axis = [0.0, 0.0, 0.0]
    axis["abc".index(speaker)] = 1.0
    return {
        "id": f"i{number}", "system": "cross", "group": "g", "language": "en-us",
        "speaker": speaker, "text": "t", "heard": "h", "words": 10, "word_errors": errors,
        "characters": 50, "character_errors": errors, "seconds": 2.0, "synthesis_seconds": 1.0,
        "hit_limit": False, "stopped": False, "looped": False, "distillmos": 3.0, "dnsmos": 2.0,
        "speech_fraction": 0.9, "embedding": axis, "prompt_embedding": axis, "cosine_own": 1.0,
        **more,
    }  # fmt: skip


def test_figures_and_their_intervals() -> None:
    rows = [item_result(n, errors=n % 3, speaker="abc"[n % 3]) for n in range(60)]
    metrics = scores.summarize(rows)["cross"]
    assert metrics["wer"]["value"] == pytest.approx(0.1)
    assert 0.07 < metrics["wer"]["low"] < 0.1 < metrics["wer"]["high"] < 0.13
    assert metrics["identified"]["value"] == 1.0 and metrics["equal_error_rate"] == 0.0
    assert metrics["cosine_other"]["value"] == 0.0 and metrics["voices"] == 3
    assert metrics["real_time_factor"] == 0.5
    assert metrics["by"]["speaker"]["b"]["wer"]["value"] == pytest.approx(0.1)
    assert [metrics["by"]["speaker"][s]["items"] for s in "abc"] == [20, 20, 20]
    # voices that all sound like `a` are identified only where that is right
    for row in rows:
        row["embedding"] = [1.0, 0.0, 0.0]
    assert scores.summarize(rows)["cross"]["identified"]["value"] == pytest.approx(1 / 3)
    # among two of the voices, one output of two is right; other figures go on being of all
    subset = scores.summarize(rows, ("a", "b", "nobody"))["cross"]
    assert (subset["identified"]["value"], subset["voices"], subset["items"]) == (0.5, 2, 60)


def test_equal_error_rate() -> None:
    assert equal_error_rate(np.array([0.8, 0.9]), np.array([0.1, 0.2])) == 0.0
    generator = np.random.default_rng(0)
    same, different = generator.normal(1, 1, 4_000), generator.normal(-1, 1, 4_000)
    assert equal_error_rate(same, different) == pytest.approx(0.1587, abs=0.015)  # Phi(-1)


def report_of(rows: list[scores.ItemResult]) -> dict:
    return {"systems": scores.summarize(rows), "records": rows}


def test_the_gate_names_the_figure() -> None:
    good, bad = ([item_result(n, errors=e) for n in range(40)] for e in (1, 4))
    bounds = (Bound(metric="cross/wer", at_most=0.3), Bound(metric="cross/distillmos", at_least=2))
    assert violations(report_of(good), bounds, None) == []
    assert violations(report_of(bad), bounds, None) == [
        "cross/wer is 0.400, at most 0.3 is allowed"
    ]
    missing = (Bound(metric="codec/wer", minus="recording/wer", at_most=0.1),)
    assert violations(report_of(good), missing, None) == ["codec/wer is not in the report"]
    part = (Bound(metric="cross/unseen, own words/wer", at_most=0.3),)
    assert violations(report_of(bad), part, None) == [
        "cross/unseen, own words/wer is not in the report"
    ]
    part = (Bound(metric="cross/g/wer", at_most=0.3),)
    assert violations(report_of(bad), part, None) == [
        "cross/g/wer is 0.400, at most 0.3 is allowed"
    ]
    apart = (Bound(metric="cross/wer", minus="cross/cer", at_most=0.05),)
    assert violations(report_of(good), apart, None) == [
        "cross/wer minus cross/cer is 0.080, at most 0.05 is allowed"
    ]
    # the champion: worse beyond noise is refused, within noise is not
    (reason,) = violations(report_of(bad), (), report_of(good))
    assert reason.startswith("word_errors loses to the champion by 0.300")
    assert violations(report_of(good), (), report_of(bad)) == []
    noisy = [item_result(n, errors=n % 3) for n in range(40)]
    assert violations(report_of(noisy), (), report_of(good)) == []
    duller = [item_result(n, errors=1, distillmos=2.0) for n in range(40)]
    (reason,) = violations(report_of(duller), (), report_of(good))
    assert reason.startswith("distillmos loses to the champion by 1.000")
    others = [item_result(n + 100) for n in range(40)]
    assert "other items" in violations(report_of(others), (), report_of(good))[0]
    with pytest.raises(ValueError, match="'cross/werr' is no metric"):
        Bound(metric="cross/werr", at_most=1)
    with pytest.raises(ValueError, match="needs at_most or at_least"):
        Bound(metric="cross/wer")


def test_sets_are_validated_and_kept_apart_from_training(home: Path, tiny_codec: Encodec) -> None:
    good = {"id": "1", "text": "Hello there.", "prompt": "p.wav", "speaker": "x"}
    path = home / "set.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps({**good, "id": 2}))
    with pytest.raises(ValueError, match=r"set.jsonl:2: wrong value type for field \"id\""):
        load_items(str(path))
    path.write_text("\n".join([json.dumps(good)] * 2))
    with pytest.raises(ValueError, match="two items have the same id"):
        load_items(str(path))
    with pytest.raises(ValueError, match="give a path to JSONL, or one of: "):
        load_items("none")
    with pytest.raises(ValueError, match="items: 'nano' is called 'standard'"):
        load_items("nano")

    write_dataset(str(home / "tokens"), tiny_codec)
    item = EvaluationItem(id="1", text="Hello there.", prompt="p", speaker="s0")
    check_unseen([item], str(home / "tokens"))
    with pytest.raises(ValueError, match="its text is in"):
        check_unseen([replace(item, text="Sentence 7!")], str(home / "tokens"))
    with pytest.raises(ValueError, match="holds s0"):
        check_unseen([replace(item, group="unseen voices")], str(home / "tokens"))


def test_shipped_sets_share_no_sentence_with_the_training_lists() -> None:
    from valle.jobs.evaluation.metrics.words import normalize_transcript
    from valle.jobs.speakers import texts

    trained = {
        normalize_transcript(line)
        for path in texts.FOLDER.glob("*.txt")
        if path.stem != "held_out"
        for line in path.read_text().splitlines()
    }
    sets = sorted(SETS.glob("*.jsonl"))
    assert sets
    for path in sets:
        for item in load_items(str(path)):
            assert normalize_transcript(item.text) not in trained, (path.name, item.id)


@pytest.fixture
def recipe_with_evaluation(
    home: Path, tiny_codec: Encodec, tiny_codec_folder: Path
) -> PublishRecipe:
    """Untrained models and three items in two espeak voices."""
    folders = {kind: home / f"runs/{kind}/step_00000001" for kind in ("ar", "nar")}
    save_checkpoints(folders, tiny_codec.identity, eos_bias=3.5)
    engine = Espeak()
    items = []
    for number, (voice, text) in enumerate(
        [("m3", "Good morning to you."), ("f2", "Good evening."), ("m3", "See you tomorrow.")]
    ):
        for name, words in (("prompt", "The weather is fine today."), ("reference", text)):
            wave = engine.synthesize(words, voice, "en-us")
            storage.write_bytes(f"speech/{name}{number}.wav", audio.wav_bytes(wave))
        items.append(
            {"id": f"i{number}", "text": text, "prompt": f"prompt{number}.wav", "speaker": voice}
            | ({"reference": f"reference{number}.wav"} if number else {})
        )
    (home / "set.jsonl").write_text("\n".join(json.dumps(item) for item in items))
    evaluation = EvaluateRecipe(items=str(home / "set.jsonl"), recordings="speech", out="report",
                                placement=Placement(gpus_per_worker=0.5))  # fmt: skip
    return PublishRecipe(
        ar="runs/ar", nar="runs/nar", codec=str(tiny_codec_folder), sample_seconds=0.5,
        sample_prompt="speech/prompt0.wav", evaluation=evaluation,
    )  # fmt: skip


@pytest.mark.ray
def test_evaluation_gate_and_rollback(
    ray_cluster: None,
    recipe_with_evaluation: PublishRecipe,
    home: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Untrained models through the real judges: shared out over two halves of a GPU = single on
    the CPU, then promotion and rollback."""
    assert publish(recipe_with_evaluation) == 1
    assert registry.champion_version() == 1
    bundle_folder = registry.resolve(registry.CHAMPION)
    first = storage.read_json(str(bundle_folder / "report.json"))
    rows = {(r["id"], r["system"]) for r in first["records"]}
    with_reference = {(f"i{n}", s) for n in (1, 2) for s in first["systems"]}
    assert rows == with_reference | {("i0", "cross")} and len(first["systems"]) == 5
    assert first["training_data_checked"] is False
    recordings = first["systems"]["recording"]
    assert recordings["wer"]["value"] < 1.0 and recordings["identified"]["value"] == 1.0
    page = (home / "report/version-1/report.html").read_text()
    assert page.count("<audio") >= 8 and (home / "report/version-1/audio/codec/i1.wav").exists()

    on_cpu = Placement(accelerator="cpu")
    single = evaluate(
        replace(recipe_with_evaluation.evaluation, workers=1, out="single", placement=on_cpu)
    )
    assert (first["accelerator"], single["accelerator"]) == ("gpu", "cpu")
    timing = {"synthesis_seconds"}
    for result, expected in zip(single["records"], first["records"], strict=True):
        assert {k: v for k, v in result.items() if k not in timing} == {
            k: v for k, v in expected.items() if k not in timing
        }

    # the gate reads one figure: one row of one actor gives it
    only_cross = replace(recipe_with_evaluation.evaluation, systems=("cross",), workers=1)
    strict = replace(
        recipe_with_evaluation,
        evaluation=only_cross,
        gate=(Bound(metric="cross/wer", at_most=0.01),),
    )
    with pytest.raises(GateError, match="version 2 stays a candidate: cross/wer is .* at most"):
        publish(strict)
    assert registry.champion_version() == 1
    assert publish(replace(strict, force="a rehearsal")) == 3
    assert registry.champion_version() == 3
    model_versions.main(["rollback", "--reason", "rehearsed"])
    assert registry.champion_version() == 1
    output = capsys.readouterr().out
    assert "forced: a rehearsal (refused for: cross/wer is" in output
    assert "rolled back: rehearsed" in output and "candidate" in output
    with pytest.raises(ValueError, match="version 1 replaced no other"):
        registry.roll_back("again")
    with pytest.raises(ValueError, match="the registry has no 9"):
        registry.promote(9, "typo")


def test_every_item_has_its_own_seed() -> None:
    assert item_seed("a", 0) != item_seed("b", 0) != item_seed("b", 1)
    assert item_seed("a", 0) == item_seed("a", 0) < 2**63


def test_unknown_judges_are_named() -> None:
    with pytest.raises(ValueError, match="nothing.here:Recognizer: no such class"):
        load_recognizer("nothing.here:Recognizer")
    with pytest.raises(
        ValueError, match="valle.jobs.evaluation.gate:SpeakerEncoder: no such class"
    ):
        load_speaker_encoder("valle.jobs.evaluation.gate:SpeakerEncoder")

"""Reports on disk in both formats, their rendering, and the gate between them."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.evaluations import make_report, measurement

from valle.jobs import demo
from valle.jobs.evaluation import report as report_module
from valle.jobs.evaluation.codec_report import CodecReport
from valle.jobs.evaluation.format1 import RENAMED_METRICS
from valle.jobs.evaluation.gate import Bound, Verdict, decide
from valle.jobs.evaluation.report import COLUMNS, mlflow_metrics, read_report, write_report
from valle.jobs.evaluation.results import EvaluationReport
from valle.jobs.publish import PublishRecipe
from valle.jobs.recipes import load
from valle.platform.recipe import RecipeError
from valle.platform.registry import SHIPPED_BUNDLE

RELEASE = SHIPPED_BUNDLE.parent
NANO = SHIPPED_BUNDLE / "report.json"
"""A report of format 1."""


@pytest.fixture(scope="module")
def nano() -> EvaluationReport:
    return read_report(str(NANO))


def test_read_report_of_format_1(nano: EvaluationReport) -> None:
    """Every value of the file is in the report, under its present name."""
    content = json.loads(NANO.read_text())
    assert "format" not in content
    assert nano.format == 2 and nano.items == "standard" and nano.accelerator is None
    assert nano.speaker_id_candidates == tuple(content["identified_among"])
    assert str(nano.metric_models) == "whisper, moonshine, resemblyzer"
    assert len(nano.results) == len(content["records"]) == 608
    for result, record in zip(nano.results, content["records"], strict=True):
        assert (result.hypothesis, result.second_hypothesis, result.empty) == (
            record["heard"],
            record["second_heard"],
            record["stopped"],
        )
        assert result.speaker_similarity == record.get("cosine_own")
        assert result.words == record["words"]
    assert content["systems"].keys() == nano.systems.keys()
    for system, metrics in content["systems"].items():
        for name, value in metrics.items():
            if name != "by":
                current = nano.systems[system].get(RENAMED_METRICS.get(name, name))
                assert value == (vars(current) if isinstance(value, dict) else current)
    group = nano.systems["cross"].by.group["unseen people"]
    assert group.speaker_id_accuracy is not None
    assert group.speaker_id_accuracy.value == pytest.approx(0.3929, abs=1e-4)


def test_from_json_is_the_inverse_of_to_json(nano: EvaluationReport) -> None:
    content = json.loads(json.dumps(nano.to_json()))
    assert content["format"] == 2
    assert EvaluationReport.from_json(content) == nano


def test_from_json_names_what_is_wrong(nano: EvaluationReport, tmp_path: Path) -> None:
    content = nano.to_json()
    for change, reason in (
        ({"format": 3}, "format: 3, but this version of valle reads 1 and 2"),
        ({"extra": 1}, "extra"),
        ({"precision": "fp8"}, "precision"),
        ({"results": [{"id": "1"}]}, r"missing value for field \"results"),
    ):
        with pytest.raises(ValueError, match=reason):
            EvaluationReport.from_json(content | change)
    with pytest.raises(ValueError, match="no evaluation report: 'judges' is missing"):
        EvaluationReport.from_json({"utterances": 3})
    path = tmp_path / "report.json"
    for text in ("{}", "no json"):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"{path}: "):
            read_report(str(path))


def test_from_json_of_an_interval_over_no_items() -> None:
    """Format 1 wrote an interval of nulls where nothing was measured."""
    content = json.loads(NANO.read_text())
    content["systems"]["cross"]["distillmos"] = {"value": None, "low": None, "high": None}
    assert EvaluationReport.from_json(content).systems["cross"].distillmos is None


def test_markdown_of_format_1_has_the_same_numbers(nano: EvaluationReport) -> None:
    """The report that was written with format 1 and a rendering today, row for row."""
    rendered = report_module.markdown(nano, report_module.worst(nano), None)
    written = (SHIPPED_BUNDLE / "report.md").read_text()

    def table_rows(page: str) -> list[str]:
        """Rows without heads, whose first cell is empty (or `id`, of the worst)."""
        return re.findall(r"^\| (?!id )[^ |].*$", page, re.MULTILINE)

    assert table_rows(rendered) == table_rows(written)
    assert len(table_rows(written)) == 6 + 4 + 1 + 14 + report_module.N_WORST
    assert "Metric models: whisper, moonshine, resemblyzer." in rendered


def test_write_report_writes_the_three_files(home: Path, nano: EvaluationReport) -> None:
    new = make_report([measurement(n, errors=1) for n in range(4)])
    write_report(new, str(home / "out"), make_report([measurement(n) for n in range(4)]))
    assert read_report(str(home / "out/report.json")) == new
    page, text = ((home / f"out/report.{end}").read_text() for end in ("html", "md"))
    assert "| cross | 10.0 (10.0 to 10.0) |" in text and "Against models:/valle/1" in page
    assert page.count("<audio") == 4 and "Metric models: whisper, resemblyzer." in page
    write_report(nano, str(home / "nano"), nano)
    page = (home / "nano/report.html").read_text()
    assert "14.6 (11.9 to 17.6)" in page and "0.0 (0.0 to 0.0)" in page


def test_mlflow_metrics_have_the_names_of_the_columns(nano: EvaluationReport) -> None:
    metrics = mlflow_metrics(nano)
    assert metrics["cross/speaker_id_accuracy"] == pytest.approx(0.663, abs=1e-3)
    assert metrics["cross/unseen people own words/wer"] == pytest.approx(0.151, abs=1e-3)
    assert {name.rpartition("/")[2] for name in metrics} == set(COLUMNS)


def test_decide_between_old_and_new_report(nano: EvaluationReport) -> None:
    """A candidate in format 2 against a champion in format 1, and the other way round."""
    candidate = copy.deepcopy(nano.to_json())
    for result in candidate["results"]:  # type: ignore[attr-defined]  # a list of dicts
        result["word_errors"] += result["words"]
    worse = EvaluationReport.from_json(candidate)
    (violation,) = decide(worse, (), nano).violations
    assert violation.metric == "word_errors"
    assert str(violation).startswith("word_errors is worse than the champion's by 1.000")
    assert decide(nano, (), worse).passed and decide(nano, (), nano).passed
    gate = load("nano", "publish", PublishRecipe).gate
    assert decide(nano, gate, nano) == Verdict(())


def reasons(report: EvaluationReport, *bounds: Bound) -> list[str]:
    return [str(violation) for violation in decide(report, bounds, None).violations]


def test_decide_names_the_metric_out_of_bounds() -> None:
    good, bad = (make_report([measurement(n, errors=e) for n in range(40)]) for e in (1, 4))
    bounds = (Bound(metric="cross/wer", at_most=0.3), Bound(metric="cross/distillmos", at_least=2))
    assert reasons(good, *bounds) == []
    assert reasons(bad, *bounds) == ["cross/wer is 0.400, at most 0.3 is allowed"]
    missing = Bound(metric="codec/wer", minus="recording/wer", at_most=0.1)
    assert reasons(good, missing) == ["codec/wer is not in the report"]
    missing = Bound(metric="cross/unseen, own words/wer", at_most=0.3)
    assert reasons(bad, missing) == ["cross/unseen, own words/wer is not in the report"]
    group = Bound(metric="cross/g/wer", at_most=0.3)
    assert reasons(bad, group) == ["cross/g/wer is 0.400, at most 0.3 is allowed"]
    difference = Bound(metric="cross/wer", minus="cross/cer", at_most=0.05)
    assert reasons(good, difference) == [
        "cross/wer minus cross/cer is 0.080, at most 0.05 is allowed"
    ]


def test_decide_refuses_regressions_beyond_noise() -> None:
    good, bad = (make_report([measurement(n, errors=e) for n in range(40)]) for e in (1, 4))
    (violation,) = decide(bad, (), good).violations
    assert str(violation).startswith("word_errors is worse than the champion's by 0.300")
    assert decide(good, (), bad).passed
    noisy = make_report([measurement(n, errors=n % 3) for n in range(40)])
    assert decide(noisy, (), good).passed
    dull = make_report([measurement(n, errors=1, distillmos=2.0) for n in range(40)])
    (violation,) = decide(dull, (), good).violations
    assert str(violation).startswith("distillmos is worse than the champion's by 1.000")


def test_decide_compares_like_with_like() -> None:
    """Each condition that differs is named, with the way out; nothing is compared then."""
    measurements = [measurement(n, errors=1) for n in range(40)]
    champion = make_report([measurement(n) for n in range(40)])
    models = champion.metric_models
    ears = replace(models, recognizer="moonshine"), replace(models, speaker_encoder="wespeaker")
    sampling = {"seed": 0, "ar": {"top_p": 0.8}}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"metric_models": ears[0]}, "recognizer is moonshine, but whisper in"),
        ({"metric_models": ears[1]}, "speaker_encoder is wespeaker"),
        ({"precision": "bf16"}, "precision is bf16, but fp32 in the champion's report"),
        ({"synthesis": {"seed": 1}}, "synthesis.seed is 1, but 0 in"),
        ({"synthesis": sampling}, "synthesis.ar.top_p is 0.8, but None in"),
        ({"text_version": "2"}, "text_version is 2, but None in"),
    ]  # fmt: skip
    for changes, expected in cases:
        verdict = decide(replace(make_report(measurements), **changes), (), champion)
        (violation,) = verdict.violations
        assert expected in str(violation) and "attach-report" in str(violation)
    verdict = decide(replace(make_report(measurements), precision="bf16", limit=3), (), champion)
    assert [v.metric for v in verdict.violations] == ["limit", "precision"]
    same = replace(make_report(measurements), code_version="0.2.0", accelerator="gpu")
    assert "word_errors is worse" in str(decide(same, (), champion))


@pytest.mark.parametrize(
    ("numbers", "fields", "message"),
    [
        (range(3), {}, "items of standard (3; the champion's 40 of standard): the report lacks 37"),
        (range(100, 140), {}, "lacks 40: i0, i1, i10, ..."),
        (range(41), {}, "has, beyond the champion's report, 1: i40"),
        (range(40), {"text": "other"}, "items have another text or prompt than the champion's"),
        (range(40), {"prompt": "o.wav"}, "items have another text or prompt"),
    ],
)
def test_decide_compares_the_same_items(
    numbers: range, fields: dict[str, Any], message: str
) -> None:
    champion = make_report([measurement(n) for n in range(40)])
    for errors in (0, 1):
        candidate = make_report([measurement(n, errors=errors, **fields) for n in numbers])
        verdict = decide(candidate, (), champion)
        assert not verdict.passed and message in str(verdict)


def test_decide_names_a_metric_that_one_report_lacks() -> None:
    whole = [measurement(n) for n in range(40)]
    part = [measurement(n, distillmos=None) if n < 5 else measurement(n) for n in range(40)]
    none = [measurement(n, distillmos=None, speaker_similarity=None) for n in range(40)]
    for candidate, champion, message in (
        (part, whole, "distillmos is missing in the candidate's report for 5 of 40 items (i0"),
        (whole, part, "distillmos is missing in the champion's report for 5 of 40 items (i0"),
        (none, whole, "speaker_similarity is missing in the candidate's report for 40 of 40"),
        (none, none, "distillmos was measured on no item of both reports"),
    ):
        verdict = decide(make_report(candidate), (), make_report(champion))
        assert not verdict.passed and message in str(verdict)


def test_decide_says_which_empty_outputs_it_left_out() -> None:
    """An empty output has no quality to measure; its words count as errors all the same."""
    silence = {"empty": True, "distillmos": None, "speaker_similarity": None}
    candidate = [measurement(n, **(silence if n == 7 else {})) for n in range(40)]
    verdict = decide(make_report(candidate), (), make_report([measurement(n) for n in range(40)]))
    assert verdict.passed
    assert str(verdict).startswith("passed the gate (distillmos compared without 1 items with an")
    assert "i7" in str(verdict)


def test_decide_refuses_a_part_of_the_set_and_a_model_that_does_not_speak() -> None:
    good = make_report([measurement(n) for n in range(40)])
    assert reasons(replace(good, limit=3)) == [
        "limit is 3: the gate is for the whole set; leave it out"
    ]
    other = make_report([measurement(n, system="codec") for n in range(40)])
    assert reasons(other) == ["cross was not evaluated: it is the model's own speech"]


def test_bound_of_unknown_metric_or_without_limit() -> None:
    with pytest.raises(ValueError, match="'cross/werr' is no metric"):
        Bound(metric="cross/werr", at_most=1)
    with pytest.raises(ValueError, match="needs at_most or at_least"):
        Bound(metric="cross/wer")


@pytest.mark.parametrize("old", ["cosine_own", "cosine_other", "identified"])
def test_gate_recipe_with_renamed_metric(tmp_path: Path, old: str) -> None:
    """The message has the name to write instead, groups included."""
    recipe = tmp_path / "old.yaml"
    recipe.write_text(
        "publish:\n  ar: a\n  nar: n\n  sample_prompt: p.wav\n"
        "  evaluation: {items: standard, recordings: r, out: o}\n"
        f"  gate: [{{metric: cross/unseen people/{old}, at_least: 0.6}}]\n"
    )
    message = (
        f"'cross/unseen people/{old}' is called cross/unseen people/{RENAMED_METRICS[old]} now"
    )
    with pytest.raises(RecipeError, match=message):
        load(str(recipe), "publish", PublishRecipe)


def test_demo_compare_shows_reports_side_by_side(nano: EvaluationReport) -> None:
    after = make_report([measurement(n, distillmos=None) for n in range(4)])
    lines = demo.compare({"before": nano, "after": after}).splitlines()
    assert lines[1] == "120 sentences held out                        before    after"
    assert lines[2] == "word error rate (whisper tiny.en)           0.146    0.000"
    assert lines[-1] == "DistillMOS                                  1.766        -"


def test_demo_verdict_says_what_it_shows(nano: EvaluationReport) -> None:
    worse, better = (make_report([measurement(n, errors=e) for n in range(4)]) for e in (9, 0))
    assert "rose from 14.6% to 90.0%" in demo.verdict({"before": nano, "after": worse})
    assert "fell from 14.6% to 0.0%" in demo.verdict({"before": nano, "after": better})
    for reports in ({"before": nano, "after": worse}, {"after": worse}):
        text = demo.verdict(reports)
        assert "not a better model" in text and "champion, which `make serve` serves, is" in text


@pytest.mark.parametrize(
    "path",
    [
        "nano/codec/evaluation.json",
        *(f"nano2/codec/evaluation-{x}.json" for x in ("en", "es", "fr")),
    ],
)
def test_codec_report_of_format_1(path: str) -> None:
    content = json.loads((RELEASE / path).read_text())
    report = CodecReport.from_json(content)
    assert report.codebook_usage == tuple(content["codebook_use"])
    metrics = report.systems["8 codebooks"]
    if "versions" in content:
        old = content["versions"]["8 codebooks"]
        assert (metrics.distillmos, metrics.speaker_similarity, metrics.wer) == (
            old["distillmos"],
            old["similarity"],
            old.get("wer"),
        )
    else:
        assert metrics.wer == content["wer_reconstruction"]
        assert report.systems["recording"].distillmos == content["distillmos_original"]
    assert CodecReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_codec_report_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="no codec report of format 2: missing value"):
        CodecReport.from_json({"codec": "nano"})
    with pytest.raises(ValueError, match="format: 7"):
        CodecReport.from_json({"format": 7})

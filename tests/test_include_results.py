"""Documents show the results of release/: the regions between markers."""

from pathlib import Path

import pytest

from valle.jobs import include_results


def test_documents_hold_the_current_results() -> None:
    assert include_results.stale_documents() == {}
    for name in ("README.md", "release/nano/README.md"):
        assert "<!-- begin:nano-results -->" in (include_results.ROOT / name).read_text()


def test_fill_regions_replaces_only_the_text_between_markers() -> None:
    begin, end = "<!-- begin:codec-results -->", "<!-- end:codec-results -->"
    document = f"# A\n{begin}\nold\n{end}\nB\n"
    filled = include_results.fill_regions(document)
    assert filled == f"# A\n{begin}\n{include_results.codec_results()}{end}\nB\n"
    assert include_results.fill_regions(filled) == filled


def test_stale_documents_names_the_document(tmp_path: Path) -> None:
    region = "<!-- begin:nano-summary -->\nold\n<!-- end:nano-summary -->\n"
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/a.md"):
        (tmp_path / name).write_text(region)
    (tmp_path / "docs/b.md").write_text("no region")
    stale = include_results.stale_documents(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in stale] == ["README.md", "docs/a.md"]
    (tmp_path / "docs/a.md").write_text(region.replace("begin", "end"))
    with pytest.raises(ValueError, match=r"docs/a.md: <!-- end:nano-summary --> has no partner"):
        include_results.stale_documents(tmp_path)
    (tmp_path / "docs/a.md").write_text(region.replace("summary", "sumary"))
    with pytest.raises(ValueError, match="a.md: no region 'nano-sumary'; expected one of nano-res"):
        include_results.stale_documents(tmp_path)


def test_main_check_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        include_results, "stale_documents", lambda: {include_results.ROOT / "README.md": "new"}
    )
    before = (include_results.ROOT / "README.md").read_bytes()
    with pytest.raises(SystemExit) as exit_error:
        include_results.main(["--check"])
    assert exit_error.value.code == 1
    assert "stale: README.md" in capsys.readouterr().out
    assert (include_results.ROOT / "README.md").read_bytes() == before

"""Manifests, metadata.csv and folders as people have them: every line and file ends as an item, or
as a reject that says where it is and why."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valle.jobs.ingest.layouts import list_items
from valle.jobs.ingest.lines import read_lines
from valle.jobs.ingest.listing import add_stamps, list_sources
from valle.jobs.ingest.source import Reject, Source, SourceItem
from valle.platform.retries import Retrier

GOOD = {"audio": "a.wav", "text": "Hello there.", "speaker": "s"}


def listed(path: Path, layout: str) -> tuple[list[SourceItem], list[Reject]]:
    return list_sources([Source(path=str(path), layout=layout)], Retrier(0))  # type: ignore[arg-type]


def manifest_of(folder: Path, data: bytes) -> tuple[list[SourceItem], list[Reject]]:
    path = folder / "list.jsonl"
    path.write_bytes(data)
    return listed(path, "manifest")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"text": None}, "text: null, a string is needed"),
        ({"text": 5}, "text: number, a string is needed"),
        ({"text": ["a"]}, "text: array, a string is needed"),
        ({"text": {"en": "a"}}, "text: object, a string is needed"),
        ({"text": True}, "text: boolean, a string is needed"),
        ({"text": ""}, "text: empty"),
        ({"text": " \u3000\n"}, "text: empty"),
        ({"text": "\ud800"}, "text: holds a zero byte or half a surrogate pair"),
        ({"speaker": None}, "speaker: null, a string is needed"),
        ({"speaker": 1.5}, "speaker: number, a string is needed"),
        ({"speaker": ""}, "speaker: empty"),
        ({"audio": None}, "audio: null, a string is needed"),
        ({"audio": ["a.wav"]}, "audio: array, a string is needed"),
        ({"audio": "a\0.wav"}, "audio: holds a zero byte"),
        ({"audio": "http://host/a.wav"}, "audio: not a usable storage URI: 'http://host/a.wav'"),
        ({"audio": "s3://b/x//a.wav"}, "audio: not a usable storage URI"),
        ({"audio": "s3://KEY:hidden@b/a.wav"}, "audio: s3://***@b/a.wav: an address must not hold"),
        ({"id": None}, "id: null, a string is needed"),
        ({"id": False}, "id: boolean, a string is needed"),
        ({"id": ""}, "id: empty"),
        ({"language": None}, "language: null, a string is needed"),
        ({"language": 3}, "language: number, a string is needed"),
    ],
)
def test_manifest_bad_field_is_a_reject_that_names_line_and_field(
    tmp_path: Path, change: dict, reason: str
) -> None:
    lines = [json.dumps(GOOD), json.dumps({**GOOD, "audio": "b.wav", **change})]
    items, rejects = manifest_of(tmp_path, "\n".join(lines).encode())
    assert [item.id for item in items] == ["list.jsonl/a.wav"]
    assert rejects[0].reason.startswith(f"bad manifest line: {reason}"), rejects
    assert rejects[0].source == f"{tmp_path}/list.jsonl:2"
    assert "hidden" not in rejects[0].reason


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{}", "audio: missing"),
        (b'{"audio": "b", "text": "x"}', "speaker: missing"),
        (b"[1]", "array, a JSON object is needed"),
        (b"null", "null, a JSON object is needed"),
        (b"not json", "not JSON"),
        (b'{"audio": "b", "text": "x", "speaker": "s"', "not JSON"),
        (b'{"text": "x", "text": "y"}', "text: the key is there twice"),
        (b'{"text": "caf\xe9"}', "not UTF-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b"[" * 100_000, "JSON is nested too deeply"),
        (b'{"a": "\x01"}', "not JSON"),
    ],
    ids=range(11),
)
def test_manifest_bad_line_is_a_reject(tmp_path: Path, line: bytes, reason: str) -> None:
    good = json.dumps(GOOD).encode()
    last = json.dumps({**GOOD, "audio": "c.wav"}).encode()
    items, rejects = manifest_of(tmp_path, b"\n".join([good, line, last]))
    assert [item.id for item in items] == ["list.jsonl/a.wav", "list.jsonl/c.wav"]
    assert rejects[0].reason.startswith(f"bad manifest line: {reason}"), rejects
    assert [reject.source for reject in rejects] == [f"{tmp_path}/list.jsonl:2"]


@pytest.mark.parametrize(
    "separator", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1e"]
)
def test_lines_end_at_line_feeds_only(tmp_path: Path, separator: str) -> None:
    """A separator of Unicode inside a text is not the end of a line, in JSONL and metadata.csv."""
    text = f"one{separator}two"
    raw = json.dumps({**GOOD, "text": text}, ensure_ascii=False)
    escaped = raw if separator in "\u2028\u2029\u0085" else json.dumps({**GOOD, "text": text})
    items, rejects = manifest_of(tmp_path, escaped.encode())
    assert [item.text for item in items] == [text] and not rejects
    (tmp_path / "wavs").mkdir()
    (tmp_path / "wavs/a.wav").touch()
    (tmp_path / "metadata.csv").write_bytes(f"a|{text}\n".encode())
    items, rejects = listed(tmp_path, "ljspeech")
    assert [item.text for item in items] == [text] and not rejects


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text.encode(),
        lambda text: text.encode("utf-8-sig"),
        lambda text: text.encode("utf-16"),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.replace("\n", "\r").encode(),
        lambda text: text.replace("\n", "\n\n  \n").encode(),
        lambda text: text.replace("\n", "\r\n").encode("utf-16"),
    ],
    ids=["utf-8", "bom", "utf-16", "crlf", "cr", "blank lines", "utf-16 crlf"],
)
def test_manifest_encodings_and_line_ends(tmp_path: Path, encode) -> None:  # type: ignore[no-untyped-def]
    text = "".join(
        json.dumps({**GOOD, "audio": f"{name}.wav", "text": "Zoë"}, ensure_ascii=False) + "\n"
        for name in "ab"
    )
    items, rejects = manifest_of(tmp_path, encode(text))
    assert [(item.id, item.text) for item in items] == [
        ("list.jsonl/a.wav", "Zoë"),
        ("list.jsonl/b.wav", "Zoë"),
    ]
    assert not rejects


def test_manifest_ids_do_not_depend_on_the_order_of_lines(tmp_path: Path) -> None:
    lines = [json.dumps({**GOOD, "audio": f"{name}.wav"}) for name in "abc"]
    before = {item.audio: item.id for item in manifest_of(tmp_path, "\n".join(lines).encode())[0]}
    new = json.dumps({**GOOD, "audio": "new.wav"})
    after = manifest_of(tmp_path, "\n".join([new, *lines[::-1]]).encode())[0]
    assert {item.audio: item.id for item in after}.items() >= before.items()
    assert len({item.id for item in after}) == 4


def test_manifest_paths_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    names = [
        "./a b#1.wav",
        "sub/../c.wav",
        "/abs/d?.wav",
        "~/e.wav",
        "file:///f%20.wav",
        "s3://b/ü g",
    ]
    lines = [json.dumps({**GOOD, "audio": name}) for name in names]
    items, rejects = manifest_of(tmp_path, "\n".join(lines).encode())
    assert [item.audio for item in items] == [
        f"{tmp_path}/a b#1.wav", f"{tmp_path}/c.wav", "/abs/d?.wav", "/home/ann/e.wav",
        "/f%20.wav", "s3://b/ü g",
    ]  # fmt: skip
    assert not rejects


def test_manifest_repeated_ids_name_both_lines(tmp_path: Path) -> None:
    rows = [GOOD, {**GOOD, "id": 7}, {**GOOD, "id": "7"}, {**GOOD, "audio": "./a.wav"}]
    items, rejects = manifest_of(tmp_path, "\n".join(map(json.dumps, rows)).encode())
    assert [item.id for item in items] == ["list.jsonl/a.wav", "7"]
    where = f"{tmp_path}/list.jsonl"
    assert [reject.reason for reject in rejects] == [
        f"repeated id: '7' of {where}:3 is that of {where}:2",
        f"repeated id: 'list.jsonl/a.wav' of {where}:4 is that of {where}:1; lines of one "
        "recording need ids of their own",
    ]


def test_metadata_bad_lines_are_rejects(tmp_path: Path) -> None:
    (tmp_path / "wavs").mkdir()
    for name in ("a.wav", "b.wav", "b.mp3", "c.FLAC", "q.wav"):
        (tmp_path / "wavs" / name).touch()
    lines = [
        b"a|raw|normalized", b"a|again", b"b|" + "Zoë".encode(), b"c|text|", b"caf\xe9|caf\xe9",
        b"gone|text", b"no columns", b"|text", b"q|", b"a|b|c|d",
        b'q|"quoted", he said|\xe2\x80\xa8',
    ]  # fmt: skip
    (tmp_path / "metadata.csv").write_bytes(b"\r\n".join(lines))
    items, rejects = listed(tmp_path, "ljspeech")
    assert [(item.audio.rpartition("/")[2], item.text) for item in items] == [
        ("a.wav", "normalized"), ("b.wav", "Zoë"), ("c.FLAC", "text"),
        ("q.wav", '"quoted", he said'),
    ]  # fmt: skip
    reasons = {reject.source.rpartition("/")[2]: reject.reason for reject in rejects}
    assert len(reasons) == len(rejects) == 8
    for where, reason in {
        "metadata.csv:2": "repeated id: ", "metadata.csv:5": "bad metadata line: not UTF-8",
        "b.mp3": "another format of a recording: b.wav is used",
        "metadata.csv:6": "no recording: ", "metadata.csv:7": "bad metadata line: 1 columns",
        "metadata.csv:8": "bad metadata line: the first column",
        "metadata.csv:9": "bad metadata line: the text is empty",
        "metadata.csv:10": "bad metadata line: 4 columns",
    }.items():  # fmt: skip
        assert reasons[where].startswith(reason), (where, reasons[where])


def test_folder_odd_files_are_rejects(tmp_path: Path) -> None:
    root = tmp_path / "corpus"
    for name in ("s/a.mp3", "s/a.wav", "s/a.txt", "s/b.OGG", "s/b.TXT", "s/no text.wav", "top.wav",
                 "s/100% #1? +ü.wav", "s/100% #1? +ü.txt"):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    (root / "s/dangling.wav").symlink_to("nowhere")
    (root / "s/circle").symlink_to(root / "s")
    os.mkfifo(root / "s/pipe.wav")
    (Path(os.fsdecode(bytes(root) + b"/s/caf\xe9.wav"))).write_text("x")
    items, rejects = listed(root, "folder")
    assert sorted(item.audio for item in items) == [
        f"{root}/s/100% #1? +ü.wav", f"{root}/s/a.wav", f"{root}/s/b.OGG",
    ]  # fmt: skip
    reasons = {reject.id: reject.reason for reject in rejects}
    assert reasons == {
        "corpus/s/a.mp3": "another format of a recording: s/a.wav is used",
        "corpus/s/no text": "no transcript beside the recording: "
        f"{root}/s/no text.txt does not exist",
        "corpus/top": "path does not match the speaker pattern: {speaker}/*",
        "corpus/s/dangling": "not a file: a pipe, a device or a broken link",
        "corpus/s/pipe": "not a file: a pipe, a device or a broken link",
        "corpus/s/caf\udce9": "file name is not UTF-8",
    }


def test_folder_vctk_tree_says_where_it_looks_for_transcripts(tmp_path: Path) -> None:
    for name in ("wav48/p225/p225_001.wav", "txt/p225/p225_001.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("x")
    _, rejects = listed(tmp_path, "folder")
    assert [reject.reason for reject in rejects] == [
        f"no transcript beside the recording: {tmp_path}/wav48/p225/p225_001.txt does not exist"
    ]


def test_stamps_change_with_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"one")
    item = add_stamps(manifest_of(tmp_path, json.dumps(GOOD).encode())[0], Retrier(0))[0]
    assert item.stamp.startswith("3@")
    (tmp_path / "a.wav").write_bytes(b"three")
    changed = add_stamps(manifest_of(tmp_path, json.dumps(GOOD).encode())[0], Retrier(0))[0]
    assert changed.stamp.startswith("5@") and changed.id == item.id
    missing = add_stamps(
        [SourceItem(**{**vars(item), "audio": "/no/b.wav", "stamp": ""})], Retrier(0)
    )
    assert missing[0].stamp == ""


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELD = st.sampled_from(["audio", "text", "speaker", "id", "language"])
ROW = st.dictionaries(FIELD, st.sampled_from(["a", "b", "c d", "é"]) | ANY_JSON)
JSON_LINE = st.tuples(ROW, st.booleans()).map(
    lambda pair: json.dumps(pair[0], ensure_ascii=pair[1]).encode("utf-8", "surrogatepass")
)
RAW_LINE = st.binary(max_size=40).filter(lambda line: b"\n" not in line)
LINE_END = st.sampled_from([b"\n", b"\r\n"])


@pytest.mark.fuzz
@given(lines=st.lists(JSON_LINE | RAW_LINE, max_size=12), end=LINE_END, bom=st.booleans())
def test_manifest_any_lines_end_as_items_or_rejects(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], end: bytes, bom: bool
) -> None:
    folder = tmp_path_factory.mktemp("manifest")
    data = (b"\xef\xbb\xbf" if bom else b"") + b"{}" + end + end.join(lines)
    items, rejects = manifest_of(folder, data)
    expected = [number for number, _ in read_lines(data)]
    where = [item.origin for item in items] + [reject.source for reject in rejects]
    assert sorted(int(place.rpartition(":")[2]) for place in where) == expected
    assert len({item.id for item in items}) == len(items)
    for item in items:
        (item.id + item.audio + item.speaker + item.language + (item.text or "")).encode()
        assert item.text and item.text.strip() and item.speaker.strip() and item.id.strip()
    for reject in rejects:
        assert reject.reason


COLUMN = st.sampled_from(["a", "b", "a.wav", "b.mp3", "", " ", "Zoë", "\u2028", "gone", "\0"])
TABLE_LINE = st.lists(COLUMN, max_size=5).map(lambda columns: "|".join(columns).encode())


@pytest.mark.fuzz
@given(lines=st.lists(TABLE_LINE | RAW_LINE, max_size=12), end=LINE_END)
def test_metadata_any_lines_end_as_items_or_rejects(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], end: bytes
) -> None:
    folder = tmp_path_factory.mktemp("lj")
    (folder / "wavs").mkdir()
    for name in ("a.wav", "b.wav", "b.mp3"):
        (folder / "wavs" / name).touch()
    data = b"no columns" + end + end.join(lines)
    (folder / "metadata.csv").write_bytes(data)
    items, rejects = listed(folder, "ljspeech")
    lines_of = [item.origin for item in items] + [
        reject.source for reject in rejects if "another format" not in reject.reason
    ]
    numbers = sorted(int(place.rpartition(":")[2]) for place in lines_of)
    assert numbers == [number for number, _ in read_lines(data)]
    assert all(item.text and item.text.strip() for item in items)


def test_list_items_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "lj").mkdir()
    for path, layout in (("none", "folder"), ("lj", "ljspeech")):
        source = Source(path=str(tmp_path / path), layout=layout)  # type: ignore[arg-type]
        with pytest.raises(FileNotFoundError, match=r"prepare.sources: .* does not exist"):
            list(list_items(source))

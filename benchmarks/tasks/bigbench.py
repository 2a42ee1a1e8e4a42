"""BIG-bench's multiple-choice tasks as task files that lm-eval runs without a hub: python benchmarks/tasks/bigbench.py
FOLDER

Fetches the source distribution of bigbench 1.0.0 (358 MB) once from pip's package index into billhook's cache folder,
and writes a YAML and a JSONL into FOLDER for each of --tasks.  The prompt is BIG-bench's own, zero-shot, but that the
choices are not listed in it: as in lm-eval's ARC or HellaSwag the model is asked how likely each one is, which is what
small models can do.  With --list-choices tasks that list them do, in an order drawn by --seed.  Of a task with more
than --limit documents so many are drawn by it.  Then: billhook evaluate MODEL --tasks FOLDER/bb_anachronisms.yaml
"""

import argparse
import base64
import difflib
import hashlib
import json
import os
import random
import re
import ssl
import subprocess
import sys
import tarfile
import urllib.parse
import urllib.request
from collections.abc import Collection
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml

from billhook import demo
from billhook.errors import BillhookError, first_line
from billhook.runtime import atomic

SDIST = "bigbench-1.0.0.tar.gz"
SHA256 = "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"
INDEX = "https://pypi.org/simple"  # where pip looks if nothing else is configured
MEMBER = re.compile(r"[^/]+/bigbench/benchmark_tasks/(?P<name>.+)/task\.(json|py)")
TASKS = (  # on which SmolLM2-135M-Instruct is more than three standard errors above chance: against_lm_eval.py
    "arithmetic/1_digit_addition",
    "general_knowledge",
    "logical_sequence",
    "phrase_relatedness",
    "similarities_abstraction",
    "undo_permutation/reorder_words",
    "unit_conversion/si_conversion",
)
CHUNK = 1 << 20


def convert(
    name: str, source: dict[str, Any], limit: int, seed: int, list_choices: bool = False
) -> list[dict[str, Any]]:
    """The documents of one task.json: `prompt`, `choices` and `answer`, the right choice's number.

    Documents without exactly one best choice are left out.

    Raises:
        BillhookError: the task is not multiple choice; the message says what it is.
    """
    examples = source.get("examples") or []
    listed = list_choices and source.get("append_choices_to_input", True)
    if not any("target_scores" in example for example in examples):
        raise BillhookError(f"{name} has no target_scores: its answers are generated, not chosen")
    orders = [random.Random(f"{seed} {name} {n}") if listed else None for n in range(len(examples))]
    found = [_document(example, source, order) for example, order in zip(examples, orders, strict=True)]
    documents = [document for document in found if document]
    if not documents:
        raise BillhookError(f"{name} has no document with one best choice")
    if len(documents) > limit:
        drawn = sorted(random.Random(f"{seed} {name}").sample(range(len(documents)), limit))
        documents = [documents[n] for n in drawn]
    return documents


def _document(example: dict[str, Any], source: dict[str, Any], order: random.Random | None) -> dict[str, Any] | None:
    """One example with its choices, listed in the prompt if there is an order to draw; None if not one of them is
    best."""
    scores = example.get("target_scores") or {}
    best = [choice for choice, score in scores.items() if score == max(scores.values())]
    if len(scores) < 2 or len(best) != 1 or not all(choice.strip() for choice in scores):
        return None
    choices, text = list(scores), example["input"]
    if order:
        text += "".join(
            source.get("choice_prefix", "\n  choice: ") + choice for choice in order.sample(choices, len(choices))
        )
    text = source.get("example_input_prefix", "\nQ: ") + text + source.get("example_output_prefix", "\nA: ")
    return {"prompt": source.get("task_prefix", "") + text, "choices": choices, "answer": choices.index(best[0])}


def write(name: str, documents: list[dict[str, Any]], to: Path) -> Path:
    """Write the task's JSONL and YAML into the folder `to`; return the YAML's path."""
    task = "bb_" + name.replace("/", "_")
    data = (to / f"{task}.jsonl").resolve()
    atomic.write_text(data, "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents))
    config = {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},  # lm-eval itself would look from where it is called
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",  # the prompt ends as BIG-bench's does
        "num_fewshot": 0,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1.0},
    }
    path = to / f"{task}.yaml"
    atomic.write_text(path, yaml.safe_dump(config, sort_keys=False))
    return path


def extract(archive: Path, names: Collection[str]) -> dict[str, dict[str, Any]]:
    """Each named task's task.json, in one pass over the archive.

    Raises:
        BillhookError: a name is no task's, or the task is a Python program, or made of others.
    """
    found: dict[str, dict[str, Any]] = {}
    kinds: dict[str, str] = {}
    with tarfile.open(archive, "r|gz") as members:
        for member in members:
            if not (match := MEMBER.fullmatch(member.name)):
                continue
            name, kind = match["name"], match[2]
            kinds[name] = "json" if "json" in (kind, kinds.get(name)) else kind
            if kind == "json" and name in names and (content := members.extractfile(member)):
                found[name] = json.load(content)
    for name in names:
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, n=3, cutoff=0.5)
            raise BillhookError(
                f"BIG-bench has no task {name!r}" + (f": did you mean {', '.join(near)}?" if near else "")
            )
        if name not in found:
            raise BillhookError(f"{name} is a Python program, not JSON: it cannot be written as a task file")
        if not found[name].get("examples"):
            parts = ", ".join(sorted(other for other in kinds if other.startswith(f"{name}/")))
            raise BillhookError(f"{name} is made of parts, name some of them: {parts}")
    return found


def fetch() -> Path:
    """The source distribution in billhook's cache folder, fetched on the first call and checked against its SHA-256.

    Not by `pip download`, which runs the package's setup.py, and that wants tensorflow.
    """
    out = demo.cache_folder() / SDIST
    if out.exists():
        return out
    index = _index()
    try:
        with _open(f"{index}/bigbench/") as page:
            links = _Links(page.geturl())
            links.feed(page.read().decode())
        if SDIST not in links.found:
            raise BillhookError(f"{index} has no {SDIST}")
        digest = hashlib.sha256()
        with atomic.file(out) as work, work.open("wb") as file, _open(links.found[SDIST]) as source:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                file.write(chunk)
            if digest.hexdigest() != SHA256:
                raise BillhookError(f"{SDIST} has SHA-256 {digest.hexdigest()}, expected {SHA256}: do not use it")
    except OSError as error:  # urllib's errors are OSErrors
        raise BillhookError(
            f"{SDIST} could not be fetched ({first_line(error)}): connect to a package index, or put the file into {out.parent}"
        ) from error
    return out


def _index() -> str:
    """The package index that pip is configured to use."""
    if os.environ.get("PIP_NO_INDEX", "0").lower() not in ("", "0", "false", "no"):
        raise BillhookError(f"{SDIST} is not in {demo.cache_folder()}, and PIP_NO_INDEX forbids fetching it")
    for name in ("install.index-url", "global.index-url"):
        asked = [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "get", name]
        if given := os.environ.get("PIP_INDEX_URL") or subprocess.run(asked, capture_output=True, text=True).stdout:
            return given.strip().rstrip("/")
    return INDEX


def _open(url: str) -> Any:
    """A response, with the user name that the URL may hold sent as pip sends it."""
    parts = urllib.parse.urlsplit(url)
    request = urllib.request.Request(parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl())
    if parts.username:
        user = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        request.add_header("Authorization", "Basic " + base64.b64encode(user.encode()).decode())
    context = ssl.create_default_context(cafile=os.environ.get("PIP_CERT"))
    return urllib.request.urlopen(request, context=context)


class _Links(HTMLParser):
    """The files that a simple index page (PEP 503) links to, by name."""

    def __init__(self, base: str) -> None:
        super().__init__()
        self.base, self.found = base, {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a" and (target := dict(attrs).get("href")):
            url = urllib.parse.urldefrag(urllib.parse.urljoin(self.base, target)).url
            self.found[urllib.parse.unquote(url.rpartition("/")[2])] = url


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", default=",".join(TASKS), help="names in BIG-bench, separated by commas")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list-choices", action="store_true")
    args = parser.parse_args()
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    try:
        sources = extract(fetch(), names)
        found = {name: convert(name, sources[name], args.limit, args.seed, args.list_choices) for name in names}
        for name, documents in found.items():
            print(f"{write(name, documents, args.folder)}: {len(documents)} documents")
    except BillhookError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

"""Every command that writes says before its work what it could not write, writes in nobody's folder, and a rehearsal
writes nothing."""

import os
import shutil
import tempfile

import pytest
from test_bad_input import Bench, bench, holding, linked, snapshot

__all__ = ["bench"]
NAMES = {
    "not UTF-8": (lambda at: at / os.fsdecode(b"\xff\xfe.html"), "not UTF-8"),
    "too long": (lambda at: at / ("y" * 245 + ".html"), "cannot write .*File name too long"),
    "too long within": (lambda at: at / ("y" * 300) / "a.html", "cannot write .*File name too long"),
    "above": (lambda at: at / "..", r"no name of its own|ends in \.html"),
    "a link to itself": (lambda at: linked(at / "loop.html"), "cannot write .*loop.html: Too many levels"),
    "among a model's": (lambda at: at / "tiny-llama" / "a.html", "lies inside the model's own folder"),
    "a model's": (lambda at: at / "tiny-llama" / "config.json", r"inside the model's own folder|ends in \.html"),
}
WRITE = {  # options that come before an output
    "search": ["--trials", 4, "--ratio", 0.2, "-o"],
    "recover": ["--objective", "ce", "--tokens", "1k", "-o"],
    "export": ["-o"],
    "quantize": ["--method", "rtn", "-o"],
    "export --overwrite": ["--overwrite", "-o"],
    "compare": ["--methods", "fasp", "--ratio", 0.2, "--report"],
    "compare --json": ["--methods", "fasp", "--ratio", 0.2, "--json"],
    "sweep": ["--ratios", "0.1,0.2", "--json"],
    "evaluate": ["--report"],
    "evaluate --json": ["--json"],
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("command", WRITE)
@pytest.mark.covering
def test_a_name_that_no_output_can_have(command: str, name: str, bench: Bench) -> None:
    place, words = NAMES[name]
    bench.refuses(words, command.split()[0], bench.model, *WRITE[command], place(bench.tmp))


def test_a_recipe_s_output(bench: Bench) -> None:
    recipe = bench.tmp / "r.yaml"
    recipe.write_text(f"model: {bench.model}\nratio: 0.2\ncalibration: {bench.text}\n")
    for name, (place, words) in NAMES.items():
        if name != "a model's":
            bench.refuses(words, "run", recipe, "-o", place(bench.tmp))


FOLDERS = {
    "prune --statistics": ("prune", ["--method=fasp", "--stream", "dense", "--statistics"], "--statistics"),
    "recover --lessons": ("recover", ["--teacher", "{model}", "--tokens", "1k", "--lessons"], "--lessons"),
    "search --study": ("search", ["--trials", 4, "--study"], "is not a run's folder"),
}


@pytest.mark.parametrize("option", FOLDERS)
def test_a_folder_that_billhook_did_not_make_is_not_written_in(option: str, bench: Bench) -> None:
    command, options, words = FOLDERS[option]
    model = shutil.copytree(bench.model, bench.tmp / "other")
    options = [str(one).format(model=bench.model) for one in options]
    budget = [] if command == "recover" else ["--ratio", 0.2, "--calibration", bench.text]
    given = [command, bench.model, "-o", bench.tmp / "out", *budget, *options]
    wrong = {
        model: "",
        holding(bench.tmp / "mine", "notes.txt"): "",
        bench.text: "",
        linked(bench.tmp / "loop"): "levels",
    }
    for folder, more in wrong.items():
        bench.refuses(more or words, *given, folder)


def test_statistics_are_kept_where_others_were_or_nothing_was(bench: Bench) -> None:
    kept = bench.tmp / "kept"
    kept.mkdir()
    for n, ratio in enumerate((0.2, 0.4)):
        given = bench.prune("--stream", "dense", "--statistics", kept, "--ratio", ratio, out=bench.tmp / f"out-{n}")
        assert bench.run(*given)[0] == 0
        assert len(list(kept.iterdir())) == 3
    bench.refuses(
        "--statistics .*out-0 holds '.*', which is no result", *bench.prune("--statistics", bench.tmp / "out-0")
    )


REHEARSED = {
    "fasp": ["--ratio", 0.2],
    "streamed": ["--ratio", 0.2, "--stream-weights"],
    "masks": ["--method", "sparsegpt", "--sparsity", 0.5],
    "statistics": ["--ratio", 0.2, "--stream", "dense", "--statistics", "{tmp}/kept"],
    "refused": ["--method", "slicegpt", "--ratio", 0.2],
    "refused by name": ["--ratio", 0.2, "--method", "fsap"],
}


@pytest.mark.parametrize("how", REHEARSED)
@pytest.mark.covering(some={"how": 2})
def test_a_rehearsal_writes_nothing_anywhere(how: str, bench: Bench) -> None:
    for name in ("HOME", "TMPDIR", "BILLHOOK_CACHE", "XDG_CACHE_HOME", "HF_HOME"):
        folder = bench.tmp / name.lower()
        folder.mkdir()
        bench.patch.setenv(name, str(folder))
    bench.patch.setattr(tempfile, "tempdir", None)
    before, out = snapshot(bench.tmp), bench.tmp / "new" / "deep" / "out"
    options = [str(one).format(tmp=bench.tmp) for one in REHEARSED[how]]
    given = ["--calibration", bench.text, "--samples", 8, "--seq-len", 32, "--multiple-of", 4]
    code, _, err = bench.run("prune", bench.model, "-o", out, "--method=fasp", *given, *options, "--dry-run")
    assert code == (2 if "refused" in how else 0), err
    assert snapshot(bench.tmp) == before

"""What needs no model answers without the libraries that take seconds to load."""

import json
import os
import subprocess
import sys

import pytest
import typer

from billhook.cli.commands import COMMANDS, FORMER, app, command
from billhook.methods import METHODS

HEAVY = ("torch", "transformers", "scipy", "datasets", "lm_eval")
RUN = f"""
import contextlib, io, json, sys
from billhook.__main__ import main
answers = []
for line in json.loads(sys.argv[1]):
    sys.argv[1:] = line.split()
    said, code = io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as left:
            code = left.code
    answers.append([code, said.getvalue(), [name for name in {HEAVY} if name in sys.modules]])
print(json.dumps(answers))
"""
OF_A_MODEL = (
    *(
        "inspect {}",
        "evaluate {}",
        "evaluate demo --against {}",
        "export {} -o out.gguf",
        "quantize {} -o out",
        "prune {} --ratio 0.2 -o out",
    ),
    *(
        "search {} --ratio 0.2 -o out",
        "recover {} --teacher demo --tokens 9 -o out",
        "forecast {} --ratio 0.2 --minutes 1",
    ),
    *("compare {} --methods fasp --ratio 0.2", "sweep {} --ratios 0.2"),
)
LINES = [  # a command line, its exit code, and words of its answer
    ("--version", 0, "billhook 0"),
    ("", 0, "Commands"),
    ("--help", 0, " prune "),
    ("prun", 2, "Did you mean 'prune'"),
    ("--versions", 2, "No such option"),
    *((f"{name} --help", 0, COMMANDS[name][1][:40]) for name in COMMANDS),
    ("methods", 0, "layerchop"),
    ("methods --json", 0, '"title"'),
    *((f"methods {name}", 0, METHODS[name].paper) for name in METHODS),
    ("methods fsap", 2, "did you mean 'fasp'"),
    ("prune . --ratio 2 -o out", 2, "ratio"),
    ("prune . --method fsap --ratio 0.2 -o out", 2, "did you mean 'fasp'"),
    ("prune . --method wanda --ratio 0.2 -o out", 2, "--sparsity"),
    ("prune . --method layerchop --ratio 0.2 --preset midle -o out", 2, "did you mean 'middle'"),
    ("prune . --ratio 0.2 --preset middle -o out", 2, "--preset belongs to --method layerchop"),
    ("prune . --ratio 0.2 --allocation none.yaml -o out", 2, "none.yaml"),
    ("search . --method fasp -o out", 2, "adapruner"),
    ("recover . --tokens 3 -o out", 2, "--teacher"),
    ("recover . -o out", 2, "--tokens"),
    ("compare . --methods fsap --ratio 0.2", 2, "did you mean 'fasp'"),
    ("sweep . --ratios 2", 2, "--ratios"),
    ("evaluate . --seq-len 1", 2, "seq-len"),
    ("check . --client torch", 2, "unknown client"),
    ("export demo --quantize Q9 -o out.gguf", 2, "unknown quantize"),
    ("quantize demo --bits 3 -o out", 2, "unknown bits"),
    ("run none.yaml -o out", 2, "none.yaml"),
    *((f"{line.format('no/such/model')}", 2, "no/such/model does not exist") for line in OF_A_MODEL),
]


@pytest.fixture(scope="module")
def answers() -> list[tuple[int, str, list[str]]]:
    """Of each line, in one process: its exit code, what it said, and heavy libraries that were loaded by then."""
    lines = json.dumps([line for line, _, _ in LINES])
    done = subprocess.run([sys.executable, "-c", RUN, lines], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("number", range(len(LINES)), ids=[line for line, _, _ in LINES])
def test_what_needs_no_model_answers_at_once(number: int, answers: list[tuple[int, str, list[str]]]) -> None:
    (line, code, words), (left, said, heavy) = LINES[number], answers[number]
    assert heavy == [], line
    assert left == code, said
    assert words in " ".join(said.split()) if " " in words.strip() else words in said


@pytest.mark.parametrize(
    ("words", "option"), [("billhook prune --pre", "--preset"), ("billhook prune . --method lay", "layerchop")]
)
def test_completion_is_light(words: str, option: str) -> None:
    asked = {"_BILLHOOK_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    check = f"import atexit, sys; from billhook.cli.commands import app; atexit.register(lambda: print([n for n in {HEAVY} if n in sys.modules])); app(prog_name='billhook')"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, env=os.environ | asked)
    assert option in done.stdout.splitlines(), done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_an_option_takes_a_line(name: str) -> None:
    """Of 110 columns: what its values mean is `billhook methods NAME`'s."""
    for option in command(name).params:
        assert len(option.help) <= 84, option.name


def test_the_package_is_light() -> None:
    check = f"import sys, billhook; assert not [name for name in {HEAVY} if name in sys.modules]"
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_listed_as_it_says_itself(name: str) -> None:
    listed, whole = typer.main.get_command(app).commands[name], command(name)
    assert whole.name == name and whole.params
    assert whole.help.splitlines()[0] == COMMANDS[name][1]
    assert listed.help.splitlines()[0] == COMMANDS[name][1]


def test_a_former_name_is_understood(capsys: pytest.CaptureFixture[str]) -> None:
    for name, now in FORMER.items():
        with pytest.raises(SystemExit):
            typer.main.get_command(app)([name, "--help"], prog_name="billhook")
        assert f"billhook {now}" in capsys.readouterr().out


def test_every_command_is_listed() -> None:
    for name in COMMANDS:
        command(name)
    assert {info.name for info in app.registered_commands} == set(COMMANDS)

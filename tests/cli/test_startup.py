"""What needs no model answers without the libraries that take seconds to load."""

import subprocess
import sys

import pytest
import typer

from billhook.cli.commands import COMMANDS, FORMER, app, command

HEAVY = ("torch", "transformers", "scipy", "datasets", "lm_eval")
RUN = f"""
import sys
from billhook.__main__ import main
try:
    main()
except SystemExit as left:
    code = left.code
assert not [name for name in {HEAVY} if name in sys.modules], sorted(sys.modules)
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("--version", 0, "billhook 0"),
        ("", 0, "Commands"),
        ("--help", 0, " prune "),
        ("prun", 2, "Did you mean 'prune'"),
        ("--versions", 2, "No such option"),
    ],
)
def test_what_needs_no_model_answers_at_once(line: str, code: int, words: str) -> None:
    done = subprocess.run([sys.executable, "-c", RUN, *line.split()], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert words in done.stdout + done.stderr


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

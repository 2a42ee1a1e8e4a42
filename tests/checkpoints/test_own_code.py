"""No code that came with a model runs, but under --trust-remote-code: folders whose code leaves a mark where it
does."""

import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import test_bad_input
import tiny
from folders import written
from test_bad_input import Bench
from test_clients import interpreter, uneven

from billhook.checkpoints import own_code, save
from billhook.checkpoints.clients import check
from billhook.errors import BillhookError
from billhook.models import layout

bench = test_bad_input.bench

MARK = "ran"
CODE = "import pathlib\npathlib.Path({!r}).touch()\nraise SystemExit('code of the folder ran')\n"
STRANGE = "modeling_strange.py"


def edit(file: Path, **settings: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def marked(folder: Path) -> Path:
    """A stock model with code of its own wherever transformers looks for some; returns the mark that it would leave."""
    mark = folder.parent / MARK
    for name in (STRANGE, "configuration_strange.py", "tokenization_strange.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(CODE.format(str(mark)))
    model = {"AutoConfig": "configuration_strange.Strange", "AutoModelForCausalLM": "modeling_strange.Strange"}
    edit(folder / "config.json", auto_map=model)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_strange.Strange", None]})
    return mark


GIVEN = "--calibration {text} --samples 8 --seq-len 32 --multiple-of 4"
JUDGED = "--text {text} --seq-len 32 --windows 4"
COMMANDS = {
    "inspect": "inspect {model}",
    "prune": f"prune {{model}} -o {{out}} --method fasp --ratio 0.2 {GIVEN}",
    "per_layer": f"prune {{model}} -o {{out}} --ratio 0.2 --layout per_layer {GIVEN}",
    "streamed": f"prune {{model}} -o {{out}} --method magnitude --sparsity 0.5 --stream-weights {GIVEN}",
    "dry-run": f"prune {{model}} -o {{out}} --ratio 0.2 --dry-run {GIVEN}",
    "evaluate": f"evaluate {{model}} {JUDGED} --parts texts --new-tokens 2",
    "compare": f"compare {{model}} --methods magnitude:sparsity=0.5,fasp --ratio 0.2 {JUDGED} {GIVEN}",
    "sweep": f"sweep {{model}} --ratios 0.2 {JUDGED} {GIVEN}",
    "recover": "recover {model} -o {out} --objective ce --text {text} --held-out {text} --seq-len 32 --tokens 64 --batch-tokens 64",
    "search": f"search {{model}} -o {{out}} --ratio 0.2 --trials 2 {GIVEN} --validation {{text}}",
    "forecast": "forecast {model} --ratio 0.2 --minutes 1",
    "export": "export {model} -o {out}.gguf",
}
SOON = ("inspect", "per_layer", "streamed", "evaluate", "export")  # the others take seconds each


@pytest.mark.parametrize("name", [pytest.param(one, marks=[] if one in SOON else pytest.mark.slow) for one in COMMANDS])
def test_no_command_runs_code_of_a_model(name: str, bench: Bench) -> None:
    """Whether it does what was asked or refuses: export, for one, may know no such tokenizer."""
    mark = marked(bench.model)
    said = COMMANDS[name].format(model=bench.model, text=bench.text, out=bench.tmp / "out")
    code, _, err = bench.run(*said.split())
    assert not mark.exists()
    assert code in (0, 2) and (code == 0 or err.startswith("billhook: error: ")), err
    if name in SOON[:4]:
        assert code == 0, err


@pytest.mark.usefixtures("stock_client")
@pytest.mark.parametrize("client", ["transformers", "vllm"])
def test_the_client_is_told_to_run_nothing(client: str, bench: Bench) -> None:
    marked(bench.model)
    asked = interpreter(bench.tmp / "python", "sys.exit('Error: asked ' + sys.stdin.read())")
    for more, allowed in (([], "false"), (["--trust-remote-code"], "true")):
        code, _, err = bench.run("check", bench.model, "--client", client, "--python", asked, *more)
        assert code == 2
        keys = ("model_code", "tokenizer_code") if client == "transformers" else ("model_code",)
        assert all(f'"{key}": {allowed}' in err for key in keys), err


@pytest.mark.usefixtures("stock_client")
@pytest.mark.slow
def test_the_stock_client_runs_what_is_trusted_alone(bench: Bench) -> None:
    mark = marked(bench.model)
    code, _, err = bench.run("check", bench.model)
    assert (code, err, mark.exists()) == (0, "", False)
    code, _, _ = bench.run("check", bench.model, "--trust-remote-code")
    assert code == 2 and mark.exists()


def changed(folder: Path) -> str:
    (folder / layout.CODE.name).write_text("# mine\n" + layout.CODE.read_text())
    return f"{layout.CODE.name} is not as billhook writes it, and is not run: .*--trust-remote-code"


def renamed(folder: Path) -> str:
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_strange.Strange"})
    return "names code that is not billhook's .*--trust-remote-code"


def elsewhere(folder: Path) -> str:
    there = {auto: f"someone/else--{own}" for auto, own in layout.auto_map("llama").items()}
    edit(folder / "config.json", auto_map=there)
    return "names code that is not billhook's"


def lost(folder: Path) -> str:
    (folder / layout.CODE.name).unlink()
    return f"lacks {layout.CODE.name}, which its config.json names"


def generating(folder: Path) -> str:
    (folder / "custom_generate").mkdir()
    return "custom_generate holds code that would run"


@pytest.mark.usefixtures("stock_client")
@pytest.mark.parametrize("damage", [changed, renamed, elsewhere, lost, generating])
def test_a_per_layer_folder_is_run_as_billhook_wrote_it_or_not_at_all(
    damage: Callable[[Path], str], tmp_path: Path
) -> None:
    (folder := tmp_path / "out").mkdir()
    save.save(uneven("llama"), tiny.tokenizer(), folder, None)
    assert own_code.needed(folder)
    words = damage(folder)
    nothing = interpreter(tmp_path / "python", f"open({str(tmp_path / MARK)!r}, 'w')")
    for client in ("transformers", "vllm"):
        with pytest.raises(BillhookError, match=words):
            check.check(folder, client, nothing)
    assert not (tmp_path / MARK).exists()


def test_a_stock_folder_needs_no_code(tmp_path: Path) -> None:
    folder = written("llama", tmp_path / "m")
    marked(folder)
    assert not own_code.needed(folder)


def test_the_text_that_is_written_is_listed() -> None:
    """Whoever changes the modelling file adds the new text, so that what this billhook writes is run by later ones."""
    assert hashlib.sha256(layout.CODE.read_bytes()).hexdigest() in own_code.WRITTEN
    assert all(re.fullmatch("[0-9a-f]{64}", one) for one in own_code.WRITTEN)


def test_a_tokenizer_that_is_code_is_refused(bench: Bench) -> None:
    mark = marked(bench.model)
    (bench.model / "tokenizer.json").unlink()
    edit(bench.model / "tokenizer_config.json", tokenizer_class="StrangeTokenizer")
    bench.refuses(r"no tokenizer could be loaded|its tokenizer is code in the folder \(auto_map\)", *bench.prune())
    assert not mark.exists() and not any("strange" in name for name in sys.modules)

"""What is written is served as billhook computes it: asked of stock transformers, and of clients that answer
otherwise."""

import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import test_bad_input
import tiny
import torch
import transformers
from processes import stock
from test_bad_input import Bench
from transformers import PreTrainedModel

import billhook
from billhook.checkpoints import save
from billhook.checkpoints.clients import check
from billhook.checkpoints.save import stored_parameters
from billhook.errors import BillhookError
from billhook.models.axes import axes
from billhook.models.surgery import drop_layers, remove

bench = test_bad_input.bench

IDS = tiny.tokens()
Answer = dict[str, Any]


def uneven(family: str) -> PreTrainedModel:
    model = tiny.model(family)
    for axis in axes(model, ("ffn",)):
        remove(model, axis, torch.arange(7 * axis.layer))
    remove(model, axes(model, ("groups",))[1], torch.tensor([0]))
    return model


def written(model: PreTrainedModel, folder: Path) -> Path:
    folder.mkdir()
    save.save(model, tiny.tokenizer(), folder, None)
    return folder


@pytest.fixture(autouse=True)
def _own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a client's transformers copies modelling files to."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))


# the real thing


@pytest.mark.usefixtures("stock_client")
def test_prune_asks_the_stock_client(bench: Bench) -> None:
    code, out, err = bench.run(*bench.prune("--json"))
    assert (code, err) == (0, "")
    (seen,) = json.loads(out)["loads"]
    assert seen == {
        "client": "transformers",
        "version": transformers.__version__,
        "tokens": "equal",
        "logits_drift": pytest.approx(0, abs=1e-5),
    }
    assert json.loads((bench.tmp / "new" / "out" / "billhook.json").read_text())["loads"] == [seen]


DISHONEST = """

import functools
PerLayerQwen3ForCausalLM = classes_of("qwen3")[2]
_honest = PerLayerQwen3ForCausalLM.forward


@functools.wraps(_honest)
def _forward(*args, **named):
    found = _honest(*args, **named)
    found.logits = 1.001 * found.logits
    return found


PerLayerQwen3ForCausalLM.forward = _forward
"""


@pytest.mark.usefixtures("stock_client")
def test_a_modelling_file_that_computes_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client runs the file in the folder, billhook its own: a thousandth is seen, and all else agrees."""

    def run(command: list[str], **given: Any) -> CompletedProcess[str]:
        at = next(n for n, part in enumerate(command) if part.endswith("transformers_client.py"))
        return stock(Path(command[at]).read_text(), command[at + 1 :], given["input"])

    monkeypatch.setattr(subprocess, "run", run)
    folder = written(uneven("qwen3"), tmp_path / "out")
    (code,) = folder.glob("*.py")
    code.write_text(code.read_text() + DISHONEST)
    words = r"does not serve .*/out as billhook does: its logits differ by 1\.0e-03 of their size$"
    with pytest.raises(BillhookError, match=words):
        check.check(folder, "transformers", trust=True)
    with pytest.raises(BillhookError, match=f"{code} is not as billhook writes it, and is not run"):
        check.check(folder, "transformers")


# clients of the tests' own: what a client says is canned, and tampered with


def truth(folder: Path, prompts: list[list[int]]) -> Answer:
    """What the transformers client should answer, by another route than billhook's load."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
    ids = torch.tensor(prompts)
    more = {"max_new_tokens": check.NEW_TOKENS, "min_new_tokens": check.NEW_TOKENS, "do_sample": False}
    with torch.no_grad():
        logits = model(ids).logits.numpy()
    greedy = model.generate(ids, pad_token_id=0, **more)[:, ids.shape[1] :].tolist()
    return {
        "version": "1.2.3",
        "parameters": stored_parameters(folder),
        "logits": {"shape": list(logits.shape), "float32": base64.b64encode(logits.astype("<f4").tobytes()).decode()},
        "greedy": greedy,
        "greedy_without_cache": greedy,
        "stock": True,
    }


def interpreter(path: Path, code: str) -> str:
    """Something to name with --python: a script that is run in the client's place."""
    path.write_text(f"#!{sys.executable} -S\nimport json, sys\n{code}\n")
    path.chmod(0o755)
    return str(path)


def saying(path: Path, answer: Answer, before: str = "") -> str:
    path.with_suffix(".json").write_text(json.dumps(answer))
    return interpreter(path, f"{before}\nprint(open({str(path.with_suffix('.json'))!r}).read())")


@pytest.fixture(params=["llama", "uneven qwen3"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    family = request.param.split()[-1]
    return written(uneven(family) if "uneven" in request.param else tiny.model(family), tmp_path / "served")


def louder(answer: Answer) -> None:
    rows = np.frombuffer(base64.b64decode(answer["logits"]["float32"]), "<f4") * np.float32(1.001)
    answer["logits"]["float32"] = base64.b64encode(rows.tobytes()).decode()


def other_token(answer: Answer) -> None:
    answer["greedy"] = [[*row[:-1], row[-1] ^ 1] for row in answer["greedy"]]


TAMPERED: dict[str, tuple[Callable[[Answer], object], str]] = {
    "logits": (louder, r"its logits differ by 1\.0e-03 of their size$"),
    "tokens": (other_token, "it generates other tokens; it generates other tokens with a cache than without$"),
    "cache": (
        lambda a: a.update(greedy_without_cache=[]),
        "it generates other tokens with a cache than without$",
    ),
    "parameters": (lambda a: a.update(parameters=a["parameters"] + 1), "it counts other parameters$"),
    "not stock": (lambda a: a.update(stock=False), "billhook was there$"),
}


@pytest.mark.usefixtures("stock_client")
def test_a_client_that_agrees_passes_and_any_difference_is_named(served: Path, tmp_path: Path) -> None:
    honest, python = truth(served, check._prompts(served)), tmp_path / "python"
    found = check.check(served, "transformers", saying(python, honest, before="print('loading')"))
    assert found == {"client": "transformers", "version": "1.2.3", "tokens": "equal", "logits_drift": 0.0}
    for tamper, words in TAMPERED.values():
        answer = json.loads(json.dumps(honest))
        tamper(answer)
        with pytest.raises(
            BillhookError, match=f"^transformers 1.2.3 does not serve {served} as billhook does: .*{words}"
        ):
            check.check(served, "transformers", saying(python, answer))
    tokens_alone = {"version": "0.9", "greedy": honest["greedy"]}
    found = check.check(served, "vllm", saying(python, tokens_alone, before="print('INFO noise')"))
    assert found == {"client": "vllm", "version": "0.9", "tokens": "equal"}
    other_token(tokens_alone)
    with pytest.raises(BillhookError, match=r"^vllm 0\.9 does not serve .*: it generates other tokens$"):
        check.check(served, "vllm", saying(python, tokens_alone))


@pytest.mark.usefixtures("stock_client")
def test_llama_cpp_is_given_a_gguf_and_compared(tmp_path: Path) -> None:
    served, python = written(uneven("llama"), tmp_path / "served"), tmp_path / "python"
    honest = truth(served, check._prompts(served))
    rows = torch.frombuffer(bytearray(base64.b64decode(honest["logits"]["float32"])), dtype=torch.float32)
    each = rows.view(honest["logits"]["shape"]).numpy()
    answer = {
        "version": "0.3",
        "greedy": honest["greedy"],
        "logits": [{"shape": r.shape, "float32": base64.b64encode(r.tobytes()).decode()} for r in each],
    }
    is_gguf = "assert open(sys.argv[3], 'rb').read(4) == b'GGUF'"
    found = check.check(served, "llama.cpp", saying(python, answer, before=is_gguf))
    assert found == {"client": "llama.cpp", "version": "0.3", "tokens": "equal", "logits_drift": 0.0}
    answer["logits"].reverse()
    with pytest.raises(BillhookError, match=r"^llama.cpp 0\.3 does not serve .*: its logits differ by"):
        check.check(served, "llama.cpp", saying(python, answer))


@pytest.mark.usefixtures("stock_client")
@pytest.mark.parametrize("client", check.CHECKS)
@pytest.mark.parametrize(
    ("code", "words"),
    [
        (
            "sys.exit('ValueError: no such architecture')",
            r"^{} could not (load|run) .*: ValueError: no such architecture$",
        ),
        ("sys.exit(3)", "^{} could not (load|run) .*: exit code 3$"),
        ("import os; os.kill(os.getpid(), 9)", "^{} could not (load|run) .*: exit code -9$"),
    ],
)
def test_a_client_that_fails_is_quoted(client: str, code: str, words: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BillhookError, match=words.format(client)):
        check.check(folder, client, interpreter(tmp_path / "python", code))


@pytest.mark.usefixtures("stock_client")
def test_the_client_runs_apart(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Isolated from the user's own modules, offline, and told what to do on standard input alone."""
    code = (
        "import os\nasked = json.load(sys.stdin)\n"
        "assert sys.argv[1] == '-I' and sys.argv[2].endswith('transformers_client.py'), sys.argv\n"
        "assert os.environ['HF_HUB_OFFLINE'] == '1' and asked['new_tokens'] == 32, asked\n"
        'sys.exit(f\'asked for {len(asked["prompts"])} of {len(asked["prompts"][0])} of {sys.argv[3]}\')'
    )
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(BillhookError, match=f"asked for 2 of 16 of {folder}$"):
        check.check(folder, "transformers", interpreter(tmp_path / "python", code))


# the command


def test_check_prints_a_table(bench: Bench) -> None:
    bench.patch.setattr(check, "check", _pretended)
    code, out, err = bench.run("check", bench.model)
    assert (code, err) == (0, "")
    assert "transformers" in out and "1.2" in out and "the same greedy tokens, logits within 2.0e-07" in out
    code, out, err = bench.run("check", bench.model, "--client", "vllm")
    assert (code, err) == (0, "") and "the same greedy tokens" in out and "logits" not in out
    code, out, err = bench.run("check", bench.model, "--client", "all", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "loads": [_pretended(bench.model, "transformers"), _pretended(bench.model, "vllm")],
        "fails": [{"client": "llama.cpp", "error": "llama.cpp is not here"}],
    }
    code, out, err = bench.run("check", bench.model, "--client", "all")
    assert (code, err) == (0, "") and "llama.cpp is not here" in " ".join(out.split())


def _pretended(path: Path, client: str, python: str | None = None, trust: bool = False) -> dict[str, Any]:
    if client == "llama.cpp":
        raise BillhookError("llama.cpp is not here")
    drift = {"logits_drift": 2e-7} if client == "transformers" else {}
    return {"client": client, "version": "1.2", "tokens": "equal", **drift}


def test_a_result_that_the_client_does_not_serve_is_not_written(bench: Bench) -> None:
    def refuses(*_: object) -> None:
        raise BillhookError("transformers 1.2 does not serve it")

    bench.patch.setattr(check, "check", refuses)
    bench.refuses("transformers 1.2 does not serve it", *bench.prune())


# billhook's own door


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_load_gives_the_model_back_and_runs_no_code_of_the_folder(family: str, tmp_path: Path) -> None:
    whole, shorter = tiny.model(family), uneven(family)
    drop_layers(shorter, [0])
    for name, model in (("whole", whole), ("uneven", uneven(family)), ("shorter", shorter)):
        folder = written(model, tmp_path / name)
        for file in folder.glob("*.py"):
            file.write_text("raise SystemExit('code from the folder was run')")
        assert len(list(folder.glob("*.py"))) == (name != "whole")
        again = billhook.load(folder)
        assert torch.equal(again(IDS).logits, model(IDS).logits) and not again.training
        assert again.config.num_hidden_layers == len(axes(model, ("ffn",)))
        half = billhook.load(str(folder), dtype="bfloat16")
        assert {param.dtype for param in half.parameters()} == {torch.bfloat16}


def test_load_refuses_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(BillhookError, match="nowhere is not a model folder"):
        billhook.load(tmp_path / "nowhere")
    folder = written(uneven("llama"), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    config["per_layer_config"]["1"]["intermediate_size"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BillhookError, match=r"tensors are missing or of another shape .*layers\.1\.mlp"):
        billhook.load(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(BillhookError, match="out is an empty folder"):
        billhook.load(folder)

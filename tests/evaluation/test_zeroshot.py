"""Zero-shot through lm-eval against lm-eval called directly, and against what can be worked out by hand."""

import importlib.util
import json
import logging
import math
import random
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import yaml
from tokenizers import processors

from billhook import data
from billhook.errors import BillhookError
from billhook.evaluation import perplexity, zeroshot
from billhook.evaluation.zeroshot import evaluate, load_tasks, retention
from billhook.runtime.run import Run

datasets = pytest.importorskip("datasets", reason="the extra 'eval' is not installed")
lm_eval = pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")

BIGBENCH = Path(__file__).parents[2] / "benchmarks" / "tasks" / "bigbench.py"


@pytest.fixture(autouse=True)
def _datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def documents(count: int = 12, seed: int = 0) -> list[dict[str, Any]]:
    """Questions of random words with two to four choices."""
    draw = random.Random(seed)
    words = [word[: 1 + n % 4] for n, word in enumerate(dict.fromkeys(tiny.text().split()))]  # of several lengths
    return [
        {"question": " ".join(draw.sample(words, 3)), "options": draw.sample(words, n := 2 + k % 3), "gold": k % n}
        for k in range(count)
    ]


def task_file(folder: Path, name: str = "words", docs: list[dict[str, Any]] | None = None, **other: Any) -> Path:
    """A task of `documents`, its data beside it and named from there; `other` replaces settings, None removes them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = documents() if docs is None else docs
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_choice": "options",
        "doc_to_target": "gold",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
    } | other
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    return path


def measure(path: Path, **settings: Any) -> dict[str, Any]:
    (row,) = evaluate(tiny.model("llama"), tiny.tokenizer(), load_tasks([str(path)]), **settings)
    return row


def by_hand(docs: list[dict[str, Any]]) -> tuple[float, float]:
    """Accuracy by the whole likelihood of a choice, and by its likelihood a character."""
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    right, right_norm = [], []
    for doc in docs:
        scores = []
        for option in doc["options"]:
            context = tokenizer(f"Q: {doc['question']}\nA:").input_ids
            ids = torch.tensor(context + tokenizer(f" {option}").input_ids)
            logs = model(ids[None]).logits[0].log_softmax(-1)
            scores.append(sum(logs[n - 1, ids[n]].item() for n in range(len(context), len(ids))))
        normed = [score / len(option) for score, option in zip(scores, doc["options"], strict=True)]
        right.append(scores.index(max(scores)) == doc["gold"])
        right_norm.append(normed.index(max(normed)) == doc["gold"])
    return sum(right) / len(docs), sum(right_norm) / len(docs)


def test_numbers_are_those_by_hand(tmp_path: Path) -> None:
    docs = documents()
    row = measure(task_file(tmp_path / "anywhere"), batch_size=4)
    accuracy, normed = by_hand(docs)
    assert (row["task"], row["metric"], row["samples"], row["shots"]) == ("words", "acc", 12, 0)
    assert (row["accuracy"], row["acc_norm"]) == (accuracy, normed)
    assert 0 < accuracy < 1 and accuracy != normed  # or the test would see little
    assert row["standard_error"] == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 11))
    assert row["chance"] == pytest.approx((4 / 2 + 4 / 3 + 4 / 4) / 12)


def test_numbers_are_those_of_lm_eval_called_directly(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [task_file(tmp_path, name, documents(20, seed)) for seed, name in enumerate(("one", "two"))]
    shots = task_file(tmp_path, "shots", documents(9), num_fewshot=2, fewshot_split="test")
    names = [str(path) for path in (*paths, shots)]
    rows = evaluate(tiny.model("llama"), tiny.tokenizer(), load_tasks(names), limit=9)
    monkeypatch.chdir(tmp_path)  # where lm-eval looks for data files
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)  # seconds of pip freeze
    found = lm_eval.simple_evaluate(
        "hf",
        {"pretrained": str(folder), "dtype": "float32"},
        names,
        limit=9,
        device="cpu",
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
    )
    for row in rows:
        own = found["results"][row["task"]]
        assert (row["accuracy"], row["standard_error"]) == (own["acc,none"], own["acc_stderr,none"])
        assert (row["acc_norm"], row["acc_norm_standard_error"]) == (own["acc_norm,none"], own["acc_norm_stderr,none"])
        assert (row["samples"], row["shots"]) == (9, found["n-shot"][row["task"]])
    assert [row["shots"] for row in rows] == [0, 0, 2]


def test_several_right_answers_raise_chance_and_one_document_has_no_error(tmp_path: Path) -> None:
    doc = {"question": "a", "options": ["b", "c", "d", "e"], "gold": [0, 2]}
    row = measure(task_file(tmp_path, docs=[doc]))
    assert (row["chance"], row["standard_error"], row["samples"]) == (0.5, None, 1)
    assert row["accuracy"] in (0.0, 1.0)


def test_a_task_file_may_include_another_and_name_functions_beside_it(tmp_path: Path) -> None:
    plain = measure(task_file(tmp_path, "plain", documents(4)))
    task_file(tmp_path, "base", documents(4), task=None, doc_to_text=None)
    (tmp_path / "prompts.py").write_text("def text(doc):\n    return f'Q: {doc[\"question\"]}\\nA:'\n")
    path = tmp_path / "child.yaml"
    path.write_text("include: base.yaml\ntask: child\ndoc_to_text: !function prompts.text\n")
    kept = tmp_path / "kept"
    assert (
        measure(path, run=Run(statistics=kept)) == plain | {"task": "child"} == measure(path, run=Run(statistics=kept))
    )
    assert len(list(kept.iterdir())) == 1  # a function has one name in every process


def test_an_open_answer_has_no_chance(tmp_path: Path) -> None:
    exact = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    open_answer = {
        "output_type": "generate_until",
        "doc_to_choice": None,
        "doc_to_target": "{{options[0]}}",
        "metric_list": exact,
        "generation_kwargs": {"max_gen_toks": 2, "until": ["\n"]},
    }
    row = measure(task_file(tmp_path, docs=documents(2), **open_answer))
    assert (row["metric"], row["accuracy"], row["chance"], row["acc_norm"]) == ("exact_match", 0.0, None, None)


def test_scores_are_of_the_model_alone(tmp_path: Path) -> None:
    """Not of its settings of `generate`, nor of an end that its tokenizer puts behind every text."""
    docs = [{"question": "say b", "options": ["b"], "gold": 0, "answer": tiny.text(3)}]
    open_answer = {"output_type": "generate_until", "doc_to_choice": None, "doc_to_target": "answer"}
    exact = {"metric_list": [{"metric": "exact_match"}], "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}}
    tasks = load_tasks([str(task_file(tmp_path)), str(task_file(tmp_path, "written", docs, **open_answer, **exact))])
    model, ending = tiny.model("llama"), tiny.tokenizer()
    expected = evaluate(model, tiny.tokenizer(), tasks)
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", 257)]
    )
    model.generation_config.stop_strings = ["a"]
    assert evaluate(model, ending, tasks) == expected


def test_a_task_that_is_finished_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(task_file(tmp_path, name, documents(4, seed))) for seed, name in enumerate(("one", "two"))]
    model, tokenizer, kept = tiny.model("llama"), tiny.tokenizer(), tmp_path / "kept"
    forward, passes = model.forward, []

    def counted(*args: Any, **settings: Any) -> Any:
        passes.append(1)
        if len(passes) > 15:  # within the second task
            raise KeyboardInterrupt
        return forward(*args, **settings)

    monkeypatch.setattr(model, "forward", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tokenizer, load_tasks(paths), run=Run(statistics=kept))
    assert len(list(kept.iterdir())) == 1
    monkeypatch.setattr(model, "forward", forward)
    rows = evaluate(model, tokenizer, load_tasks(paths), run=Run(statistics=kept))

    def refuses(*args: Any, **settings: Any) -> Any:
        raise AssertionError("it ran")

    monkeypatch.setattr(model, "forward", refuses)
    assert evaluate(model, tokenizer, load_tasks(paths), run=Run(statistics=kept)) == rows
    again = evaluate(tiny.model("llama"), tiny.tokenizer(), load_tasks(paths))
    assert again == rows
    for file in kept.iterdir():
        file.write_text("{")  # damaged
    with pytest.raises(BillhookError, match=r"one-\w+\.json cannot be read .*: delete it, it will be made again"):
        evaluate(model, tokenizer, load_tasks(paths), run=Run(statistics=kept))


@pytest.mark.parametrize("what", ["weights", "config", "limit", "seed", "prompt", "document"])
def test_what_changes_a_number_is_not_taken_from_the_last_run(what: str, tmp_path: Path) -> None:
    kept, model, docs = tmp_path / "kept", tiny.model("llama"), documents(3)
    evaluate(model, tiny.tokenizer(), load_tasks([str(task_file(tmp_path, docs=docs))]), run=Run(statistics=kept))
    settings: dict[str, Any] = {"limit": {"limit": 2}, "seed": {"seed": 1}}.get(what, {})
    other = {"doc_to_text": "{{question}}"} if what == "prompt" else {}
    if what == "weights":
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    if what == "config":
        model.config.rms_norm_eps *= 2
    if what == "document":
        docs[2] |= {"gold": 0}
    path = task_file(tmp_path, docs=docs, **other)
    evaluate(model, tiny.tokenizer(), load_tasks([str(path)]), run=Run(statistics=kept), **settings)
    assert len(list(kept.iterdir())) == 2


def test_progress_is_told_and_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[str, int, int]] = []
    names = [str(task_file(tmp_path, name)) for name in ("one", "two")]
    level = logging.getLogger("lm_eval").level
    tasks = load_tasks(names, lambda *step: seen.append(step))
    assert seen == [("loading tasks", 0, 2), ("loading tasks", 1, 2), ("loading tasks", 2, 2)]
    evaluate(tiny.model("llama"), tiny.tokenizer(), tasks, batch_size=4, run=Run(lambda *step: seen.append(step)))
    assert ("task one", 4, 36) in seen and seen[-1] == ("task two", 12, 12)
    assert all(done <= total for _, done, total in seen)
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("lm_eval").level == level


def test_model_tokenizer_and_random_states_are_left_alone(tmp_path: Path) -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    tokenizer.pad_token = None
    np.random.seed(7), torch.manual_seed(7)  # not Python's own: beartype draws from it
    evaluate(model, tokenizer, load_tasks([str(task_file(tmp_path))]), limit=1)
    assert tokenizer.pad_token is None and not model._forward_hooks
    found = np.random.rand(), torch.rand(1).item()
    np.random.seed(7), torch.manual_seed(7)
    assert found == (np.random.rand(), torch.rand(1).item())


def row(task: str, accuracy: float, chance: float | None = 0.25, error: float | None = 0.05) -> dict[str, Any]:
    return {"task": task, "accuracy": accuracy, "chance": chance, "standard_error": error}


def test_retention_by_hand() -> None:
    dense = [row("a", 0.75), row("b", 0.45), row("c", 0.34), row("open", 0.5, None), row("one", 1.0, 0.5, None)]
    pruned = [row("b", 0.2), row("a", 0.5), row("c", 0.34), row("open", 0.25, None), row("one", 1.0, 0.5, None)]
    found = retention(dense, [*pruned, row("only here", 1.0)])
    assert found is not None
    assert found["above_chance"] == pytest.approx((0.25 / 0.5 + -0.05 / 0.2) / 2)
    assert found["plain"] == pytest.approx((0.2 + 0.5 + 0.34 + 0.25 + 1.0) / (0.75 + 0.45 + 0.34 + 0.5 + 1.0))
    assert (found["tasks"], found["left_out"]) == (["a", "b"], ["c", "open", "one"])
    assert retention(dense, dense) == {**found, "above_chance": 1.0, "plain": 1.0}
    assert retention([row("c", 0.3)], [row("c", 0.3)])["above_chance"] is None  # type: ignore[index]
    assert retention(dense, [row("other", 0.5)]) is None


@pytest.fixture
def small_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index of one folder in place of lm-eval's own, which takes seconds to read."""

    class Manager(lm_eval.tasks.TaskManager):
        def __init__(self, include_defaults: bool) -> None:
            assert include_defaults
            super().__init__(include_path=str(tmp_path), include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Manager)


@pytest.mark.usefixtures("small_index")
def test_a_name_that_lm_eval_does_not_know(tmp_path: Path) -> None:
    task_file(tmp_path, "hellaswag")
    with pytest.raises(BillhookError, match=r"^lm-eval has no task 'helaswag': did you mean hellaswag\? `lm-eval ls"):
        load_tasks(["helaswag"])
    with pytest.raises(BillhookError, match=r"^lm-eval has no task 'zzzz': `lm-eval ls"):
        load_tasks(["zzzz"])


@pytest.mark.usefixtures("small_index")
def test_a_group_is_its_tasks(tmp_path: Path) -> None:
    for name in ("one", "two"):
        data = {"data_files": {"test": str(tmp_path / f"{name}.jsonl")}}
        task_file(tmp_path, name, documents(3), dataset_kwargs=data)
    (tmp_path / "group.yaml").write_text("group: both\ntask: [two, one]\n")
    assert list(load_tasks(["both"])) == ["two", "one"]
    with pytest.raises(BillhookError, match="task 'one' is named twice"):
        load_tasks(["both", "one"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"task": None}, "has no key 'task' that names it"),
        ({"task": ["a", "b"], "group": "g"}, "describes a group: name its tasks one by one"),
        ({"doc_to_txt": "x"}, "could not load it .*doc_to_txt"),
        ({"doc_to_text": "{{nothing}}"}, "could not load it .*nothing"),
        ({"test_split": "validation"}, "could not load it .*validation"),
        ({"output_type": "choice"}, "could not load it .*choice"),
        ({"dataset_kwargs": {"data_files": "gone.jsonl"}}, "could not load it .*gone.jsonl"),
        ({"include": "gone.yaml"}, "cannot read it .*gone.yaml"),
        ({"doc_to_choice": "question"}, "document 0: doc_to_choice gives no list of two or more texts"),
        (
            {"docs": [{"question": "a", "options": ["b", "c"], "gold": gold} for gold in (0, 2)]},
            "document 1: the answer is none of",
        ),
        ({"docs": []}, "could not load it"),
        ({"metric_list": [{"metric": "brier_score"}]}, "has no accuracy .* only brier_score"),
        ({"unsafe_code": True}, "runs code that the model writes"),
    ],
)
def test_a_malformed_task_file(
    wrong: dict[str, Any], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = task_file(tmp_path, **wrong)
    with pytest.raises(BillhookError, match=message) as caught:
        load_tasks([str(path)])
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: a\nmetric_list: [\n")
    with pytest.raises(BillhookError, match=r"broken.yaml, line 3: not YAML"):
        load_tasks([str(broken)])
    broken.write_text("just words")
    with pytest.raises(BillhookError, match=r"cannot read it .*dict"):
        load_tasks([str(broken)])
    broken.write_text("task: a\ndoc_to_text: !function utils.text\n")
    with pytest.raises(BillhookError, match=r"cannot read it .*utils"):
        load_tasks([str(broken)])
    with pytest.raises(BillhookError, match=r"task file gone.yaml does not exist"):
        load_tasks(["gone.yaml"])
    path = task_file(tmp_path, "half")
    (tmp_path / "half.jsonl").write_text('{"question": ')
    with pytest.raises(BillhookError, match="could not load it"):
        load_tasks([str(path)])


def test_two_tasks_of_one_name(tmp_path: Path) -> None:
    paths = [str(task_file(tmp_path / folder)) for folder in "ab"]
    with pytest.raises(BillhookError, match="task 'words' is named twice"):
        load_tasks(paths)
    with pytest.raises(BillhookError, match="task 'words' is named twice"):
        load_tasks([paths[0], paths[0]])


def test_lm_eval_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(BillhookError, match=r"need lm-eval.*: pip install 'billhook\[eval\]'$"):
        load_tasks(["hellaswag"])


# benchmarks/tasks/bigbench.py, on archives made here


@pytest.fixture
def bigbench() -> Any:
    spec = importlib.util.spec_from_file_location("bigbench_tasks", BIGBENCH)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SOURCE = {
    "name": "sky",
    "task_prefix": "Think.\n",
    "example_output_prefix": "\nAnswer: ",
    "examples": [
        {"input": "The sky is", "target_scores": {"green": 0, "blue": 1, "red": 0.5}},
        {"input": "Grass is", "target_scores": {"green": 1, "blue": 0}},
        {"input": "two are best", "target_scores": {"a": 1, "b": 1}},
        {"input": "one choice", "target_scores": {"a": 1}},
        {"input": "no choices", "target": "a"},
    ],
}


def test_bigbench_documents_by_hand(bigbench: Any) -> None:
    sky, grass = bigbench.convert("sky", SOURCE, limit=200, seed=0)
    assert sky == {"prompt": "Think.\n\nQ: The sky is\nAnswer: ", "choices": ["green", "blue", "red"], "answer": 1}
    assert grass == {"prompt": "Think.\n\nQ: Grass is\nAnswer: ", "choices": ["green", "blue"], "answer": 0}
    assert bigbench.convert("sky", SOURCE, limit=1, seed=0) in ([sky], [grass])


def test_bigbench_choices_are_listed_in_any_order(bigbench: Any) -> None:
    prompts = {bigbench.convert("sky", SOURCE, 200, seed, list_choices=True)[1]["prompt"] for seed in range(8)}
    listed = ("\n  choice: green\n  choice: blue", "\n  choice: blue\n  choice: green")
    assert prompts == {f"Think.\n\nQ: Grass is{choices}\nAnswer: " for choices in listed}
    plain = bigbench.convert("sky", SOURCE | {"append_choices_to_input": False}, 200, 0, list_choices=True)
    assert plain[1]["prompt"] == "Think.\n\nQ: Grass is\nAnswer: "  # the task's own way


def test_bigbench_tasks_run(bigbench: Any, tmp_path: Path) -> None:
    path = bigbench.write("sky/at_noon", bigbench.convert("sky", SOURCE, 200, 0), tmp_path / "out")
    assert path.name == "bb_sky_at_noon.yaml"
    found = measure(path)
    assert (found["task"], found["samples"], found["shots"]) == ("bb_sky_at_noon", 2, 0)
    assert found["chance"] == pytest.approx((1 / 3 + 1 / 2) / 2) and found["acc_norm"] is not None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"examples": [{"input": "a", "target": "b"}]}, "no target_scores: its answers are generated"),
        ({"examples": SOURCE["examples"][2:]}, "no document with one best choice"),
    ],
)
def test_bigbench_says_why_not(bigbench: Any, source: dict[str, Any], message: str) -> None:
    with pytest.raises(BillhookError, match=message):
        bigbench.convert("sky", source, limit=9, seed=0)


def test_bigbench_archive(
    bigbench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = tmp_path / "bigbench-1.0.0" / "bigbench" / "benchmark_tasks"
    for name, file in (("sky/at_noon", "task.json"), ("sky", "task.json"), ("program", "task.py")):
        (inside / name).mkdir(parents=True, exist_ok=True)
        (inside / name / file).write_text(json.dumps(SOURCE if "/" in name else {}))
    monkeypatch.setenv("BILLHOOK_CACHE", str(tmp_path))
    command = ["bigbench.py", str(tmp_path / "out"), "--tasks"]
    monkeypatch.setattr(sys, "argv", [*command, "sky/at_noon"])
    with pytest.raises(SystemExit, match="PIP_NO_INDEX forbids fetching it"):
        bigbench.main()
    with tarfile.open(tmp_path / bigbench.SDIST, "w:gz") as archive:
        archive.add(inside.parent.parent, arcname="bigbench-1.0.0")
    bigbench.main()
    assert capsys.readouterr().out == f"{tmp_path}/out/bb_sky_at_noon.yaml: 2 documents\n"
    for name, message in {
        "program": "program is a Python program, not JSON",
        "sky": "sky is made of parts, name some of them: sky/at_noon",
        "sky/at_non": "BIG-bench has no task 'sky/at_non': did you mean sky/at_noon",
    }.items():
        monkeypatch.setattr(sys, "argv", [*command, f"{name},sky/at_noon"])
        with pytest.raises(SystemExit, match=message):
            bigbench.main()


def test_perplexity_is_the_rolling_likelihood_of_lm_eval() -> None:
    """The same windows: lm-eval's rolling ones over a text whose first token is the prefix, all of them predicted but
    it."""
    model, tokens = tiny.model("llama"), tiny.tokens(3, 24)
    wrapped = zeroshot._wrap(model, tiny.tokenizer(), 1)
    nats = 0.0
    for window in tokens.tolist():
        rolled = lm_eval.utils.get_rolling_token_windows(window[1:], window[0], max_seq_len=23, context_len=1)
        ((context, continuation),) = map(lm_eval.utils.make_disjoint_window, rolled)
        ((likelihood, _),) = wrapped._loglikelihood_tokens([(("", ""), context, continuation)], disable_tqdm=True)
        nats -= likelihood
    found = perplexity.perplexity(model, data.Windows("words", tokens, 3, "", ""))
    assert found.perplexity == pytest.approx(math.exp(nats / found.tokens), rel=1e-5)

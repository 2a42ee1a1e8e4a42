"""Zero-shot accuracy through lm-eval: its tasks, its prompts and its scoring, around a model that is already loaded.

lm-eval is an optional extra, `pip install 'billhook[eval]'`; no other module imports it.
"""

import copy
import functools
import hashlib
import json
import logging
import random
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from billhook.errors import BillhookError, first_line
from billhook.models.greedy import without_generation_settings
from billhook.runtime import cache
from billhook.runtime.progress import Tick, quiet, ticked
from billhook.runtime.quiet import quiet_transformers
from billhook.runtime.run import Run
from billhook.runtime.special_tokens import without_end_token

SEED = 1234  # lm-eval's seed for numpy, torch and few-shot examples; its seed for Python's random is 0
METRICS = ("acc", "exact_match")  # metrics that count as accuracy; a task's first one is taken
CLEARLY = 2  # a score is compared if it is at least so many standard errors above chance
CHOICES = "multiple_choice"  # lm-eval's type of tasks with choices
WRITES = "generate_until"  # lm-eval's type of tasks in which the model writes
PATHS = ("data_files", "data_dir")  # keys of dataset_kwargs with paths, which may be relative to the task file
FILE_NAME = re.compile(r"[^\w-]")  # characters of a task's name that a file name should not have
NOT_CONTENT = ("metadata", "dataset_kwargs", "dataset_path", "dataset_name")  # keys without effect beside documents


def load_tasks(names: Sequence[str], tick: Tick = quiet) -> dict[str, Any]:
    """lm-eval's tasks by name, in the order given, with their documents loaded, before any model is.

    Args:
        names: lm-eval's names of tasks, tags or groups (the latter two expand to their tasks), or paths of tasks' YAML
            files.  Data files that a YAML names are first looked for beside it.  YAML files may name Python functions,
            which are run.

    Raises:
        BillhookError: lm-eval is not installed, does not know a name or cannot build its task, a file is malformed, two
            tasks have one name, or a task has no accuracy.
    """
    manager_class = _task_manager()
    with _silence(), _seeded(SEED):  # lm-eval draws random numbers even for a task's name
        files = {name: _read_file(name) for name in names if Path(name).suffix in (".yaml", ".yml")}
        # lm-eval's own index takes seconds to read
        manager = manager_class(include_defaults=len(files) < len(set(names)))
        for name in names:
            if name not in files and name not in manager.task_index:
                raise BillhookError(_unknown(name, manager.all_tasks))
        tasks: dict[str, Any] = {}
        for name in ticked(names, "loading tasks", tick):
            for task in _build(manager, name, files.get(name, name)):
                if task.task_name in tasks:
                    raise BillhookError(
                        f"task {task.task_name!r} is named twice: name it once, or rename one of the two"
                    )
                _check(task)
                if name in files:
                    _check_documents(task, name)
                tasks[task.task_name] = task
    return tasks


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Mapping[str, Any],
    *,
    limit: int | None = None,
    batch_size: int = 1,
    seed: int = SEED,
    run: Run | None = None,
) -> list[dict[str, Any]]:
    """Score the model on `load_tasks`' tasks with lm-eval's stock settings (no chat template); one row a task.

    Args:
        limit: score only the first `limit` documents of each task.
        batch_size: rows in one forward pass; padding changes rounding, which can decide a near tie.
        run: its `statistics` keeps each task's row once it is measured; a row of the same weights, tokenizer, documents
            and settings is read from there.

    Returns:
        "task"; "metric", one of METRICS with lm-eval's filter; "accuracy"; "acc_norm", by likelihood per character, or
        None; the standard error of each, None for a single document; "chance", the mean over documents of right choices
        per choice, None without a list of choices; "samples", documents scored; "shots" in the prompt, lm-eval's own
        number for the task.
    """
    rows: list[dict[str, Any]] = []
    run = run or Run()
    kept, tick = run.statistics, run.tick
    subject = _model_hash(model, without_end_token(tokenizer)) if kept else ""
    wrapped = functools.cache(lambda: _wrap(model, tokenizer, batch_size))
    with _silence(), _seeded(seed):
        for name, task in tasks.items():
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            key = {"decided by": key_of(subject, task, limit, seed)} if kept else {}
            row = cache.cached(
                kept, FILE_NAME.sub("_", name), key, lambda task=task: _score(wrapped(), task, limit, seed, tick)
            )
            tick(f"task {name}", row["samples"], row["samples"])
            rows.append(row)
    return rows


def retention(dense: Sequence[Mapping[str, Any]], pruned: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """How much of the dense model's accuracy is left, over the tasks that both models have; None if there are none.

    Returns:
        "above_chance": the mean of (accuracy - chance) / (dense accuracy - chance) over "tasks", those on which the
            dense model is at least two standard errors above a known chance (on others the quotient is noise); None if
            there are none.  A model worse than chance counts below zero.
        "left_out": the other tasks.
        "plain": mean accuracy / mean dense accuracy over all tasks, as papers print it; a model that only guesses does
            well by it.
    """
    after = {row["task"]: row for row in pruned}
    pairs = [(row, after[row["task"]]) for row in dense if row["task"] in after]
    if not pairs:
        return None
    clear = [(before, now) for before, now in pairs if _above_chance(before)]
    shares = [(now["accuracy"] - before["chance"]) / (before["accuracy"] - before["chance"]) for before, now in clear]
    base = statistics.fmean(before["accuracy"] for before, _ in pairs)
    names = [before["task"] for before, _ in clear]
    return {
        "above_chance": statistics.fmean(shares) if shares else None,
        "plain": statistics.fmean(now["accuracy"] for _, now in pairs) / base if base else None,
        "tasks": names,
        "left_out": [before["task"] for before, _ in pairs if before["task"] not in names],
    }


def _above_chance(row: Mapping[str, Any]) -> bool:
    if row["chance"] is None or row["standard_error"] is None:
        return False
    return row["accuracy"] > row["chance"] and row["accuracy"] - row["chance"] >= CLEARLY * row["standard_error"]


def _task_manager() -> Any:
    try:
        import lm_eval  # noqa: F401
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise BillhookError(
            f"zero-shot tasks need lm-eval, which cannot be imported ({first_line(error)}): "
            "pip install 'billhook[eval]'"
        ) from error
    return TaskManager


def _unknown(name: str, valid: Sequence[str]) -> str:
    near = get_close_matches(name, valid, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return (
        f"lm-eval has no task {name!r}: {hint}`lm-eval ls tasks` lists all; a task of your own is named by its .yaml "
        "file"
    )


def _read_file(name: str) -> dict[str, Any]:
    """A task file's settings, its includes and functions resolved by lm-eval."""
    # TaskManager reads files too, but looks for their data in the working folder
    from lm_eval.tasks._yaml_loader import load_yaml

    path = Path(name).expanduser()
    if not path.is_file():
        raise BillhookError(f"task file {name} does not exist")
    try:
        config = load_yaml(path)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise BillhookError(f"task file {name}{where}: not YAML ({getattr(error, 'problem', None)})") from error
    except Exception as error:  # a function's module may raise anything
        raise BillhookError(f"task file {name}: lm-eval cannot read it ({first_line(error)})") from error
    if not isinstance(config.get("task"), str):
        kind = (
            "describes a group: name its tasks one by one" if "group" in config else "has no key 'task' that names it"
        )
        raise BillhookError(f"task file {name} {kind}")
    arguments = config.get("dataset_kwargs")
    if isinstance(arguments, dict):
        paths = {key: _beside(value, path.parent.resolve()) for key, value in arguments.items() if key in PATHS}
        config["dataset_kwargs"] = arguments | paths
    return config


def _beside(value: Any, folder: Path) -> Any:
    """Make paths absolute that exist beside the task file, in lists and by split; others stay as they are."""
    if isinstance(value, dict):
        return {key: _beside(inner, folder) for key, inner in value.items()}
    if isinstance(value, list):
        return [_beside(inner, folder) for inner in value]
    return str(folder / value) if isinstance(value, str) and (folder / value).exists() else value


def _build(manager: Any, name: str, spec: str | dict[str, Any]) -> list[Any]:
    try:
        with _seeded(SEED):  # a few tasks shuffle their choices as they load
            return list(manager.load([spec])["tasks"].values())
    except Exception as error:  # templates, functions, metrics and datasets raise dozens of kinds
        why = first_line(error.__cause__ or error)  # datasets wraps what was wrong
        what = f"task file {name}" if isinstance(spec, dict) else f"task {name}"
        raise BillhookError(f"{what}: lm-eval could not load it ({type(error).__name__}: {why})") from error


def _check(task: Any) -> None:
    """Refuse a task that has no accuracy, or that needs more than text in and text out."""
    metrics = list(task.aggregation())
    if not any(metric in METRICS for metric in metrics):
        raise BillhookError(
            f"task {task.task_name} has no accuracy ({' or '.join(METRICS)}), only {', '.join(metrics)}: "
            "name other tasks"
        )
    if getattr(task, "UNSAFE_CODE", False):
        raise BillhookError(f"task {task.task_name} runs code that the model writes: billhook does not")
    if getattr(task, "MULTIMODAL", False):
        raise BillhookError(f"task {task.task_name} is not text alone: name other tasks")


def _check_documents(task: Any, name: str) -> None:
    """Refuse documents whose answer is none of their choices: lm-eval counts them as wrong, almost silently."""
    if not _has_choices(task):
        return
    for n, doc in enumerate(task.eval_docs):
        choices, right = _choices(task, doc)
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
            raise BillhookError(f"task file {name}, document {n}: doc_to_choice gives no list of two or more texts")
        if not right:
            raise BillhookError(f"task file {name}, document {n}: the answer is none of its {len(choices)} choices")


def _has_choices(task: Any) -> bool:
    return task.OUTPUT_TYPE == CHOICES and not callable(task.config.process_results)


def _choices(task: Any, doc: Any) -> tuple[Any, set[int]]:
    """A document's choices, and the numbers of the right ones."""
    choices = task.doc_to_choice(doc)
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    numbers = [
        choices.index(answer) if isinstance(answer, str) and answer in choices else answer
        for answer in (gold if isinstance(gold, list) else [gold])
    ]
    return choices, {number for number in numbers if isinstance(number, int) and 0 <= number < len(choices)}


def _wrap(model: Any, tokenizer: Any, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    wrapper: Any = HFLM
    # a copy, since HFLM changes a tokenizer that has no padding token
    encode = copy.deepcopy(without_end_token(tokenizer))
    return wrapper(pretrained=model, tokenizer=encode, backend="causal", batch_size=batch_size)


def _score(wrapped: Any, task: Any, limit: int | None, seed: int, tick: Tick) -> dict[str, Any]:
    """Score one task as lm-eval's simple_evaluate does, without its report of the machine."""
    import lm_eval

    run: Any = lm_eval.evaluate
    name, done = task.task_name, 0

    def count(_: Any, inputs: tuple[Any, ...], __: Any) -> None:
        nonlocal done
        done += len(inputs[0]) if inputs else 1
        tick(f"task {name}", min(done, len(task.instances)), len(task.instances))

    task.set_fewshot_seed(seed)
    with ExitStack() as stack:
        if task.OUTPUT_TYPE != WRITES:  # in a task that writes, every token is a forward pass
            stack.callback(wrapped.model.register_forward_hook(count).remove)
        # a mean's standard error has a closed form; `bootstrap_iters` is for other metrics, not reported here
        stack.enter_context(without_generation_settings(wrapped.model))
        results = run(wrapped, {"tasks": {name: task}}, limit=limit, bootstrap_iters=2, log_samples=False)
    scores = results["results"][name]
    metric = next(key for wanted in METRICS for key in scores if key.partition(",")[0] == wanted)
    norm = metric.replace("acc,", "acc_norm,")
    documents = {instance.doc_id: instance.doc for instance in task.instances}.values()
    return {
        "task": name,
        "metric": metric.removesuffix(",none"),
        "accuracy": float(scores[metric]),
        "standard_error": _error(scores, metric),
        "acc_norm": float(scores[norm]) if norm != metric and norm in scores else None,
        "acc_norm_standard_error": _error(scores, norm) if norm != metric else None,
        "chance": _chance(task, documents) if _has_choices(task) else None,
        "samples": int(results["n-samples"][name]["effective"]),
        "shots": int(task.get_config("num_fewshot")),
    }


def _error(scores: Mapping[str, Any], metric: str) -> float | None:
    value = scores.get(metric.replace(",", "_stderr,", 1), "N/A")
    return None if value == "N/A" else float(value)


def _chance(task: Any, documents: Any) -> float:
    pairs = [_choices(task, doc) for doc in documents]
    return statistics.fmean(len(right) / len(choices) for choices, right in pairs)


def key_of(subject: str, task: Any, limit: int | None, seed: int = SEED) -> str:
    """A hash of everything that a row depends on; `subject` stands for the model."""
    import lm_eval

    config = {key: value for key, value in task.dump_config().items() if key not in NOT_CONTENT}
    decoding = ["greedily, by none of the model's own settings"] if task.OUTPUT_TYPE == WRITES else []
    digest = hashlib.sha256(_json([subject, lm_eval.__version__, config, limit, seed, *decoding]))
    shown = task.fewshot_docs() if task.get_config("num_fewshot") else None
    for doc in chain(islice(task.eval_docs, limit), shown or ()):
        digest.update(_json(doc))
    return digest.hexdigest()


def _model_hash(model: Any, tokenizer: Any) -> str:
    """A hash of the model and of its tokenizer."""
    digest = hashlib.sha256()
    digest.update(
        _json([cache.model_key(model), tokenizer.special_tokens_map, tokenizer.init_kwargs.get("add_bos_token")])
    )
    words = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else tokenizer.get_vocab()
    digest.update(_json({key: value for key, value in words.items() if key not in ("padding", "truncation")}))
    return digest.hexdigest()


def _json(value: Any) -> bytes:
    """JSON that is the same in every process; functions are written by their names."""
    return json.dumps(value, sort_keys=True, default=lambda v: getattr(v, "__qualname__", None) or str(v)).encode()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """While open, random generators have lm-eval's seeds; afterwards their former states."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(0)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def _silence() -> Iterator[None]:
    """Keep lm-eval's logs and progress bars off the terminal.

    tqdm itself is silenced: lm-eval has no setting for it, and redirecting stderr would hide billhook's own bar as
    well.
    """
    import tqdm as bars

    bar_class: Any = bars.tqdm
    draw = bar_class.__init__

    def hushed(bar: Any, *args: Any, **settings: Any) -> None:
        draw(bar, *args, **(settings | {"disable": True}))

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    try:
        bar_class.__init__ = hushed
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with quiet_transformers():
            yield
    finally:
        bar_class.__init__ = draw
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

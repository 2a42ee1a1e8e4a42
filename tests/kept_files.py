"""Every file that billhook keeps for itself or is given settings in, and what reads it: for tests that damage them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tiny
import torch
from example_reports import cut
from fuzzing import Damage, file_damages, json_damages, safetensors_damages, sample
from test_data import members, wheel_of

from billhook import demo
from billhook.checkpoints.resume import FinishedLayers
from billhook.models.axes import axes
from billhook.models.surgery import remove
from billhook.planning import allocation, planners
from billhook.pruning.recipe import read_recipe
from billhook.runtime import cache, run_folder
from billhook.runtime.cache import Grams
from billhook.search import evidence
from billhook.training import schedule, teacher, trainer


@dataclass(frozen=True)
class Kept:
    """A file, and what reads it."""

    path: Path
    read: Callable[[], object]

    def damages(self, most: int | None = None) -> list[Damage]:
        """All of them, or at most so many."""
        found = self._damages(most)
        return found if most is None else sample(found, most)

    def _damages(self, most: int | None) -> list[Damage]:
        content, ending = self.path.read_bytes(), self.path.suffix
        found = list(file_damages(content))
        if ending in (".json", ".yaml"):  # JSON is YAML
            found += json_damages(content, most=most)
        return found + list(safetensors_damages(content, most=most)) if ending == ".safetensors" else found


def result(folder: Path) -> Kept:
    def read() -> object:
        return cache.cached(folder, "trial", {"a": 1}, lambda: {"loss": [3.5, float("nan")], "name": "x"})

    read()
    return Kept(next(folder.glob("trial-*")), read)


def run_name(folder: Path) -> Kept:
    key = {"model": "m", "settings": {"ratio": 0.2, "axes": ["ffn"]}}
    run_folder.claim(folder / "run", key, fresh=False)
    return Kept(folder / "run" / run_folder.NAME, lambda: run_folder.claim(folder / "run", key, fresh=False))


def _journal(folder: Path, ending: str) -> Kept:
    model = tiny.model("llama")
    axis, units = axes(model, ("ffn",))[1], torch.tensor([0, 3, 5])
    folder.mkdir(exist_ok=True)
    remove(model, axis, units)
    FinishedLayers(folder, model).save(1, cut(3, ("ffn",))["cuts"][:1], [(axis, units)])

    def read() -> None:
        found = FinishedLayers(folder, tiny.model("llama"))
        assert found.found[0]["layer"] == 0
        found.reload(1)

    return Kept(folder / f"layer-1.{ending}", read)


def layer_record(folder: Path) -> Kept:
    return _journal(folder, "json")


def layer_weights(folder: Path) -> Kept:
    return _journal(folder, "safetensors")


def rotation(folder: Path) -> Kept:
    folder.mkdir(exist_ok=True)
    finished = FinishedLayers(folder, tiny.model("llama"))

    def read() -> object:
        return finished.once("rotation", lambda: torch.eye(4))

    read()
    return Kept(folder / "rotation.safetensors", read)


def gram(folder: Path) -> Kept:
    grams = Grams(folder, {"a": 1})
    grams.keep("layers.0.q", torch.eye(4), torch.eye(4))
    return Kept(next(folder.glob("gram-*")), lambda: grams.read("layers.0.q", torch.device("cpu")))


def gates(folder: Path) -> Kept:
    model, tokens = tiny.model("llama"), tiny.tokens()

    def read() -> object:
        return evidence.gate_fishers(model, tokens, ("ffn",), folder=folder)

    read()
    return Kept(next(folder.glob("gates-*")), read)


def lesson(folder: Path) -> Kept:
    model, tokens = tiny.model("llama"), tiny.tokens()

    def read() -> object:
        return teacher.fill_cache(model, tokens, folder, teacher.Lesson(4, True)).of(1)

    read()
    return Kept(next(folder.glob("teacher-*")), read)


def _checkpoint(folder: Path, name: str) -> Kept:
    found = folder / "checkpoint-3"
    found.mkdir(parents=True)
    (found / "optimizer.pt").write_bytes(bytes(range(256)))
    (found / trainer.STATE).write_text(json.dumps({"log_history": [{"step": 3, "losses": {"a": [1.0]}}]}))
    schedule.mark_whole(found)

    def read() -> object:
        return schedule.is_whole(found) and trainer._history(found)

    return Kept(found / name, read)


def checkpoint_list(folder: Path) -> Kept:
    return _checkpoint(folder, schedule.WHOLE)


def checkpoint_state(folder: Path) -> Kept:
    return _checkpoint(folder, trainer.STATE)


def checkpoint_optimizer(folder: Path) -> Kept:
    return _checkpoint(folder, "optimizer.pt")


def recipe(folder: Path) -> Kept:
    folder.mkdir()
    said = {"model": "demo", "ratio": 0.2, "axes": ["ffn"], "layout": "uniform", "expect": {"news": 1.5}}
    (folder / "r.yaml").write_text(json.dumps(said))
    return Kept(folder / "r.yaml", lambda: read_recipe(folder / "r.yaml"))


def shares(folder: Path) -> Kept:
    folder.mkdir()
    (folder / "a.yaml").write_text(json.dumps({n: {"ffn": 16, "heads": 4} for n in range(3)}))
    model = tiny.model("llama")

    def read() -> object:
        found = allocation.parse(str(folder / "a.yaml")).keep
        assert found is not None
        return planners.file_plan(model, ("ffn", "heads"), found)

    return Kept(folder / "a.yaml", read)


def demo_text(folder: Path) -> Kept:
    demo.TEXT = wheel_of(members(300))
    place = demo.cache_folder() / "some-1"
    place.mkdir(parents=True)
    for name, content in members(300).items():
        (place / name).write_bytes(content)
    return Kept(place / "lee.cor", demo.evaluation_texts)


KEPT: dict[str, Callable[[Path], Kept]] = {
    one.__name__: one
    for one in (
        *(result, run_name, layer_record, layer_weights, rotation, gram, gates, lesson),
        *(checkpoint_list, checkpoint_state, checkpoint_optimizer, recipe, shares, demo_text),
    )
}
TAKEN = {
    "checkpoint_list",
    "checkpoint_state",
    "checkpoint_optimizer",
}  # damaged, what is in them is made again

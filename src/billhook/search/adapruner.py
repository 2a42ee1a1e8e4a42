"""AdaPruner (Kong et al. 2025, arXiv:2503.06184): search the calibration samples and the importance metric, together.

1. Evidence     one backward pass over a pool of windows; after it a candidate's mask costs no data (billhook.search.metrics).
2. Known ones   every fixed metric on the whole pool is tried; the best is the standard, which the search may not fall behind.
3. Rounds       a sampler asks for a few candidates; a proxy without a forward pass, 1/2 sum of the dropped gates' Fisher on
                validation windows, drops the worse half; the others are tried, mask in place, on a few windows that the next round
                does not see again, and the sampler is told by how much each is worse than the standard on these very windows.
4. Ladder       the best go on to more windows, those on the front of gain and steadiness to restoration, and one is left.
5. Acceptance   it is taken if windows that nothing has seen say, paired, that it beats the best of the standards, restored like it
                and FASP's own score among them, by more than two standard errors.

Steps 3 to 5 are billhook's: of the paper the outline is public (a joint space of data and metrics, candidates scored by the pruned
model, TPE).  A search that trusts a few hundred tokens lowers its own loss and raises everyone else's (docs/LOG.md).
"""

import copy
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from billhook import data
from billhook.checkpoints.load import Opened
from billhook.cuts.narrowing import Settings, narrow
from billhook.data import Text
from billhook.errors import BillhookError
from billhook.math.overlap import overlapping
from billhook.models.plan import AxisKey, Plan
from billhook.models.surgery import cast
from billhook.reports.search_tables import OF_FASP
from billhook.runtime import cache
from billhook.runtime.progress import Clock, Tick, quiet
from billhook.runtime.run_folder import claim
from billhook.runtime.special_tokens import special_ids
from billhook.search import pool
from billhook.search.metrics import PoolEvidence, scores, shares
from billhook.search.pool import Pool
from billhook.search.rounds import (
    FINALISTS,
    HERE,
    PROMOTED,
    RESTORED_ON,
    RUNGS,
    Search,
    Trial,
    Validation,
    deadline,
    gained,
    validation,
    verdict,
)
from billhook.search.samplers import Study
from billhook.search.settings import SearchSettings
from billhook.search.space import Candidate
from billhook.search.trials import Means, bench_of, tried, workers
from billhook.tensors import Scores, Tokens

PARTS = 5  # steps from the standard to the winner
BUDGETS = "and its budgets"
RESTORED = "and restored"
STANDARDS = 1  # known metrics, the best first, that finalists are measured against
RESTORING = 4  # forward passes that it takes of them
KEPT = 0.2  # of a calibration text, at its end, for validation where there is no other


@dataclass(frozen=True)
class Found:
    """What to cut, and how that came about."""

    scores: Mapping[AxisKey, Scores]
    plan: Plan
    record: dict[str, Any]


@dataclass(frozen=True)
class Material:
    """What a search reads."""

    calibration: Text  # what finalists and the winner are restored on
    pool: Pool
    validation: Validation
    judges: tuple[str, ...]  # names of the validation texts
    samples: tuple[str, ...]  # the pool's windows, as text


def read(opened: Opened, chosen: SearchSettings, tick: Tick = quiet) -> Material:
    """The pool and the windows that candidates are tried on, from the recipe's texts.

    Raises:
        BillhookError: a text is too short, or validation and calibration share windows (says how many).
    """
    texts, split, judges = judged(opened, chosen, tick)
    embedding = opened.model.get_input_embeddings().weight.detach()
    found = pool.draw(texts, opened.tokenizer, embedding, chosen.pool, chosen.pool_len, chosen.clusters, chosen.seed)
    samples = tuple(map(opened.tokenizer.decode, found.tokens[:, len(found.begins_with) :]))
    return Material(data.joined(texts), found, split, judges, samples)


def judged(
    opened: Opened, chosen: SearchSettings, tick: Tick = quiet
) -> tuple[Sequence[Text], Validation, tuple[str, ...]]:
    """The texts that calibrate, the windows that candidates are tried on, and the names of their texts.

    Raises:
        BillhookError: as `read`.
    """
    texts = data.texts(chosen.calibration, tick)
    if chosen.validation:
        judges = data.evaluation_texts(chosen.validation, tick)
    else:
        texts, judges = zip(*(_split(text) for text in texts), strict=True)
    leading = len(special_ids(opened.tokenizer)[0])  # the same in all windows: not what makes two texts one
    windows = torch.cat([data.windows(text, opened.tokenizer, chosen.seq_len).tokens for text in judges])
    known = [data.windows(text, opened.tokenizer, chosen.pool_len).tokens[:, leading:].flatten() for text in texts]
    twice = overlapping(windows[:, leading:], torch.cat(known)[None])
    if chosen.validation and twice.any():
        raise BillhookError(
            f"{int(twice.sum())} of the {len(windows)} windows of --validation are also in the calibration text, and would judge what they "
            "have calibrated: name another"
        )
    # a text repeats itself here and there
    return texts, validation(windows[~twice], chosen.seed, leading), tuple(text.name for text in judges)


def _split(text: Text) -> tuple[Text, Text]:
    """A text without its last fifth, and that."""
    at = int(len(text.text) * (1 - KEPT))
    return replace(text, text=text.text[:at]), Text(f"the last fifth of {text.name}", text.text[at:])


def search(  # noqa: PLR0913
    model: PreTrainedModel,
    chosen: SearchSettings,
    base: Plan,
    material: Material,
    calibration: Tokens,
    settings: Settings,
    *,
    folder: Path | None = None,
    means: Means = HERE,
    clock: Clock | None = None,
    tick: Tick = quiet,
) -> Found:
    """Search, and return the scores and the plan of what won, or of the best fixed metric.

    Args:
        base: how much goes from every axis; candidates with a shape of their own save as much.
        calibration: windows that finalists are restored on.
        settings: of the restoration, if there is one.
        folder: keeps the evidence and every loss where there is no study's own.

    Raises:
        BillhookError: nothing is open to choose; no known metric works; the time is too short for one round; the study's folder
            is another search's.
    """
    clock, started = clock or Clock(), time.perf_counter()
    texts, here = material.validation, bench_of(model, chosen.objective, means.study or folder)
    if means.study:
        settled = chosen.model_dump(mode="json", exclude={"trials", "minutes"})
        seen = cache.digest({"tokens": material.pool.tokens.tolist()})
        claim(means.study, {**here.key, "settings": settled, "pool": seen}, means.fresh)
    with workers(here, means.workers) as bench:
        with clock("evidence"):
            at = Search(model, chosen, base, material.pool, texts, bench, tick)
        with clock("known metrics"):
            before = time.perf_counter()
            known = at.try_known()
            tokens = len(known) * RUNGS[1] * texts.rungs.shape[1]
            pace = tokens / max(time.perf_counter() - before, 1e-6)
        over = deadline(chosen.minutes, started, _end_tokens(texts, settings, calibration[:RESTORED_ON].numel()) / pace)
        study = Study(at.space.dimensions(), chosen.sampler, chosen.seed)
        with clock("trials"):
            trials = at.rounds(study, over)
        with clock("promotion"):
            promoted = at.promote(trials)
        finals = Finals(at, calibration, settings)
        with clock("finals"):
            decided = finals.decide(known, promoted[:FINALISTS])
            winner: Candidate = decided.pop("candidate")
            parts = finals.parts(winner, decided.pop("losses"))
    record = {
        "space": chosen.space,
        "dimensions": list(at.space.dimensions()),
        "sampler": chosen.sampler,
        "objective": chosen.objective,
        "seed": chosen.seed,
        "trials": [said(trial, _said_candidate(trial.candidate)) for trial in trials],
        "known": known,
        "promoted": [trial.number for trial in promoted],
        "importance": study.importance(),
        "winner": _said_candidate(winner),
        "parts": parts,
        **decided,
        "pool": _said_pool(material, at.evidence, winner),
        "judges": list(material.judges),
        "validation": {part: list(getattr(texts, part).shape) for part in ("proxy", "rungs", "final")},
        "rung_windows": at.used,
    }
    return Found(_scores(at, winner), at.plan(winner), record)


def _end_tokens(texts: Validation, settings: Settings, calibration: int) -> int:
    """Tokens of the forward passes that follow the trials."""
    promoted = (PROMOTED + 1) * RUNGS[1] * texts.rungs.shape[1]
    finals = (2 * FINALISTS + STANDARDS + 1) * (
        RUNGS[2] * texts.rungs.shape[1] + texts.final.numel() + (RESTORING * calibration if settings.restoration else 0)
    )
    return promoted + finals + PARTS * texts.final.numel()


class Finals:
    """Steps 4 and 5: finalists as they will be, restored or not, first on rung windows, then on those that decide."""

    def __init__(self, at: Search, calibration: Tokens, settings: Settings) -> None:
        self.at, self.calibration, self.settings = at, calibration[:RESTORED_ON], settings

    def decide(self, known: Sequence[Mapping[str, Any]], finalists: Sequence[Trial]) -> dict[str, Any]:
        """The winner: the best finalist if it beats the best standard on windows that nothing has seen, else that standard.

        Standards are the best of the known metrics and, where kept weights are repaired, FASP's own score: what is best before a
        repair need not be best after it.  So finalists with budgets of their own stand there a second time, by that score.
        """
        metrics = [one["metric"] for one in sorted(known, key=lambda one: _or_worst(one["loss"]))[:STANDARDS]]
        standards = {name: Candidate(self.at.space.known[name]) for name in metrics}
        others = [(trial.number, trial.candidate) for trial in finalists]
        if self.settings.restoration:
            standards[f"{self.settings.score}{OF_FASP}"] = Candidate()
            again = {trial.number: replace(trial.candidate, solution=None) for trial in finalists}
            others += [(n, one) for n, one in again.items() if one != Candidate()]
        every, names = [*standards.values(), *(one for _, one in others)], [*standards, *(n for n, _ in others)]
        rung = self.at.windows(RUNGS[2])
        losses = self._restored(every, rung) if self.settings.restoration else self._cut(every, rung)
        order = sorted(range(len(every)), key=lambda n: _or_worst(statistics.fmean(losses[n][0])))
        standard = next(n for n in order if n < len(standards))
        best = next((n for n in order if n >= len(standards)), None)
        decided = verdict(losses[standard][1], losses[standard if best is None else best][1])
        rows = [
            {
                "name": name,
                "by_fasp": one.solution is None,
                "rung": statistics.fmean(on_rung),
                "final": statistics.fmean(on_final),
                **gained(losses[standard][1], on_final),
            }
            for name, one, (on_rung, on_final) in zip(names, every, losses, strict=True)
        ]
        taken = best if decided["accepted"] and best is not None else standard
        return {
            "candidate": every[taken],
            "losses": losses[taken][1],
            "standard": names[standard],
            "chosen": None if best is None else names[best],
            "by_fasp": best is not None and every[best].solution is None,
            "finalists": rows,
            **decided,
            "restoration": self.settings.restoration,
        }

    def parts(self, winner: Candidate, restored: list[float]) -> list[dict[str, Any]]:
        """What samples, metric and budgets each bring, on the windows that decided, without restoration; and what that brings then."""
        standard, own = self.at.standard, winner.solution
        steps = {"the best fixed metric on the whole pool": Candidate(standard)}
        if own:
            metric = {name: getattr(own, name) for name in ("coefficients", "power", "reduction", "within")}
            samples = {name: getattr(own, name) for name in ("levels", "count", "draw")}
            steps |= {
                "its samples changed": Candidate(replace(standard, **samples)),
                "its metric changed": Candidate(replace(standard, **metric)),
                "both": Candidate(own),
            }
        if replace(winner, solution=None) != Candidate():
            steps[BUDGETS] = replace(winner, solution=own or standard)
        masks = {name: self.at.mask(one) for name, one in steps.items()}
        found = self.at.bench.losses(
            [self.at.masks[m] for m in masks.values()], self.at.texts.final, self.at.tick, "parts"
        )
        told = dict(zip(steps, found, strict=True))
        if self.settings.restoration:
            told[RESTORED] = restored
        return [
            {"what": name, "loss": statistics.fmean(losses), **gained(found[0], losses)}
            for name, losses in told.items()
        ]

    def _cut(self, candidates: Sequence[Candidate], rung: Tokens) -> list[tuple[list[float], list[float]]]:
        masks, bench = [self.at.masks[self.at.mask(one)] for one in candidates], self.at.bench
        both = [bench.losses(masks, windows, self.at.tick, "finals") for windows in (rung, self.at.texts.final)]
        return list(zip(*both, strict=True))

    def _restored(self, candidates: Sequence[Candidate], rung: Tokens) -> list[tuple[list[float], list[float]]]:
        """As the result will be, by the recipe's own stream, on fewer calibration windows."""
        at, bench, found = self.at, self.at.bench, []
        both = rung, at.texts.final
        shared = {
            **bench.key,
            "calibration": cache.digest({"tokens": self.calibration.tolist()}),
            "settings": {**asdict(self.settings), "stream": at.chosen.stream},
            "windows": [cache.digest({"tokens": each.tolist()}) for each in both],
        }

        def measured(candidate: Candidate, plan: Plan) -> list[list[float]]:
            smaller = copy.deepcopy(at.model)
            cast(smaller, bench.autocast or smaller.dtype)  # as good, and a third faster (docs/LOG.md)
            narrow(
                smaller, self.calibration, plan, self.settings, scores=_scores(at, candidate), stream=at.chosen.stream
            )
            return [tried(smaller, {}, windows, None, None, bench.autocast) for windows in both]

        for n, one in enumerate(candidates):
            at.tick("restoring finalists", n, len(candidates))
            plan = at.plan(one)
            cut = {f"{layer} {kind}": count for (layer, kind), count in plan.drops.items()}
            key = {**shared, "cut": cut, "layers": list(plan.layers), "mask": one.solution and at.mask(one)}
            measure = partial(measured, one, plan)
            found.append(tuple(cache.cached(bench.folder, "final", key, measure)))
        at.tick("restoring finalists", len(candidates), len(candidates))
        return found


def _scores(at: Search, candidate: Candidate) -> Mapping[AxisKey, Scores]:
    """By a candidate's own solution; none are needed for FASP's score."""
    return scores(at.evidence, candidate.solution) if candidate.solution else {}


def _or_worst(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def said(trial: Trial, candidate: Mapping[str, Any]) -> dict[str, Any]:
    """A trial for the record."""
    return {
        "number": trial.number,
        "mask": trial.mask,
        "state": trial.state,
        "proxy": trial.proxy,
        "worse": trial.worse,
        **candidate,
        **({"gain": gained(trial.losses["standard"], trial.losses["promoted"])} if "promoted" in trial.losses else {}),
    }


def _said_candidate(candidate: Candidate) -> dict[str, Any]:
    return {
        "solution": candidate.solution and candidate.solution.describe(),
        "shape": candidate.shape and asdict(candidate.shape),
        "attention": candidate.attention,
        "block": candidate.block,
    }


def _said_pool(material: Material, evidence: PoolEvidence, winner: Candidate) -> dict[str, Any]:
    """Of every window: its text's number, its cluster, what it weighs in the winner's mixture, and what it says."""
    pool = material.pool
    own = winner.solution
    weights = shares(evidence.clusters, own) if own else torch.zeros(len(pool.tokens))
    return {
        "sources": list(pool.sources),
        "seq_len": pool.tokens.shape[1],
        "begins_with": list(pool.begins_with),
        "left_out": pool.left_out,
        "source": list(pool.source),
        "clusters": pool.clusters.tolist(),
        "shares": [round(float(one), 6) for one in weights],
        "samples": list(material.samples),
    }

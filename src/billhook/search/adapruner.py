"""AdaPruner (Kong et al. 2025, arXiv:2503.06184): search the calibration samples and the importance metric together.

1. Evidence     one backward pass over a pool of windows; after it a candidate's mask costs no data
                (billhook.search.metrics).
2. Known ones   every known metric on the whole pool is tried; the best is the standard, which the search may not fall
                behind.
3. Rounds       a sampler proposes a few candidates.  A proxy without a forward pass, 1/2 sum of the dropped gates'
                Fisher on validation windows, drops the worse half.  The others are tried, mask in place, on a few
                windows that the next round does not see again; the sampler is told by how much each is worse than the
                standard on these windows.
4. Ladder       the best are tried on more windows, those on the front of gain and steadiness are restored, and one is
                left.
5. Acceptance   it is taken if it beats the best of the standards by more than two standard errors, paired, on windows
                that nothing has seen.  The standards are restored like it, and FASP's own score is among them.

Steps 3 to 5 are billhook's: of the paper the outline is public (a joint space of data and metrics, candidates scored by
the pruned model, TPE).  A search that trusts a few hundred tokens lowers its own loss and raises everyone else's
(docs/LOG.md).
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from billhook.cuts.narrowing import Settings
from billhook.models.plan import Plan, UnitScores
from billhook.runtime import cache
from billhook.runtime.progress import Clock, Tick, quiet
from billhook.runtime.run_folder import claim
from billhook.search.budgets import BaseCut
from billhook.search.evaluator import IN_PROCESS, Execution, evaluator_of, with_workers
from billhook.search.finals import STANDARDS, Finals, scores_of
from billhook.search.inputs import Inputs
from billhook.search.ladder import FINALISTS, PROMOTED, RESTORED_ON, RUNGS, deadline
from billhook.search.metrics import PoolEvidence, shares
from billhook.search.problem import prepare
from billhook.search.rounds import Rounds, try_known
from billhook.search.samplers import Study
from billhook.search.settings import SearchSettings
from billhook.search.space import Candidate
from billhook.search.validation import RungWindows, Validation
from billhook.tensors import Tokens

PARTS = 5  # steps from the standard to the winner, each tried on the deciding windows
RESTORING = 4  # forward passes over the calibration windows that a restoration costs


@dataclass(frozen=True)
class Found:
    """What to cut, and how that came about."""

    scores: UnitScores
    plan: Plan
    record: dict[str, Any]


def search(  # noqa: PLR0913
    model: PreTrainedModel,
    chosen: SearchSettings,
    base: Plan,
    inputs: Inputs,
    calibration: Tokens,
    settings: Settings,
    *,
    folder: Path | None = None,
    execution: Execution = IN_PROCESS,
    clock: Clock | None = None,
    tick: Tick = quiet,
) -> Found:
    """Search, and return the scores and the plan of the winner: a candidate, or the best standard.

    Args:
        base: how much goes from every axis; candidates with a shape of their own save as much.
        calibration: (windows, length), what finalists are restored on.
        settings: settings of the restoration, if there is one.
        folder: keeps the evidence and every loss where the search has no study folder.

    Raises:
        BillhookError: nothing is open to choose; no known metric works; the time is too short for one round; the study
            folder is another search's.
    """
    clock, started = clock or Clock(), time.perf_counter()
    validation, rungs = inputs.texts.validation, RungWindows(inputs.texts.validation.rungs)
    alone = evaluator_of(model, chosen.objective, execution.study or folder)
    if execution.study:
        settled = chosen.model_dump(mode="json", exclude={"trials", "minutes"})
        pool_sha256 = cache.digest({"tokens": inputs.pool.tokens.tolist()})
        claim(execution.study, {**alone.key, "settings": settled, "pool": pool_sha256}, execution.fresh)
    with with_workers(alone, execution.workers) as evaluator:
        with clock("evidence"):
            cut = BaseCut(model, base, chosen.width_step, chosen.layout)
            problem = prepare(cut, chosen, inputs.pool, validation, evaluator, rungs, tick)
        with clock("known metrics"):
            before = time.perf_counter()
            known = try_known(problem, rungs, tick)
            tokens = len(known.rows) * RUNGS[1] * validation.rungs.shape[1]
            pace = tokens / max(time.perf_counter() - before, 1e-6)
        end = _end_tokens(validation, settings, calibration[:RESTORED_ON].numel()) / pace
        is_over = deadline(chosen.minutes, started, end)
        study = Study(problem.space.dimensions(), chosen.sampler, chosen.seed)
        rounds = Rounds(problem, known, rungs, tick)
        with clock("trials"):
            trials = rounds.run(study, is_over)
        with clock("promotion"):
            promoted = rounds.promote(trials)
        with clock("finals"):
            rung = rungs.take(RUNGS[2])
            restored_on = calibration[:RESTORED_ON]
            finals = Finals(problem, known.standard, rung, validation.final, restored_on, settings, tick)
            decision = finals.decide(known.rows, promoted[:FINALISTS])
            winner = decision.candidate
            parts = finals.parts(winner, decision.losses)
    record = {
        "space": chosen.space,
        "dimensions": list(problem.space.dimensions()),
        "sampler": chosen.sampler,
        "objective": chosen.objective,
        "seed": chosen.seed,
        "trials": [trial.record(_candidate_record(trial.candidate)) for trial in trials],
        "known": list(known.rows),
        "promoted": [trial.number for trial in promoted],
        "importance": study.importance(),
        "winner": _candidate_record(winner),
        "parts": parts,
        **decision.record,
        "pool": _pool_record(inputs, problem.evidence, winner),
        "judges": list(inputs.texts.names),
        "validation": {part: list(getattr(validation, part).shape) for part in ("proxy", "rungs", "final")},
        "rung_windows": rungs.used,
    }
    return Found(scores_of(problem, winner), problem.plan(winner), record)


def _end_tokens(validation: Validation, settings: Settings, calibration: int) -> int:
    """Tokens of the forward passes that follow the trials."""
    short, final = validation.rungs.shape[1], validation.final.numel()
    restoring = RESTORING * calibration if settings.restoration else 0
    promotion = (PROMOTED + 1) * RUNGS[1] * short
    finals = (2 * FINALISTS + STANDARDS + 1) * (RUNGS[2] * short + final + restoring)
    return promotion + finals + PARTS * final


def _candidate_record(candidate: Candidate) -> dict[str, Any]:
    return {
        "solution": candidate.solution and candidate.solution.describe(),
        "shape": candidate.shape and asdict(candidate.shape),
        "attention": candidate.attention,
        "block": candidate.block,
    }


def _pool_record(inputs: Inputs, evidence: PoolEvidence, winner: Candidate) -> dict[str, Any]:
    """Every window of the pool: its text's number, its cluster, its share in the winner's mixture, and its text."""
    pool, solution = inputs.pool, winner.solution
    weights = shares(evidence.clusters, solution) if solution else torch.zeros(len(pool.tokens))
    return {
        "sources": list(pool.sources),
        "seq_len": pool.tokens.shape[1],
        "begins_with": list(pool.begins_with),
        "left_out": pool.left_out,
        "source": list(pool.source),
        "clusters": pool.clusters.tolist(),
        "shares": [round(float(weight), 6) for weight in weights],
        "samples": list(inputs.samples),
    }

"""What a budget of minutes buys in tokens, what of it is spent on rates and evaluations, and when to evaluate."""

from billhook.recovery.settings import Recovery
from billhook.training.text_windows import HELD_OUT

EVALUATIONS = (3, 10)  # the least and the most evaluations in a run
EVALUATING = 0.15  # share of the training's cost that evaluations may take between these limits
FORWARD = 1 / 3  # cost of a forward pass as a share of a training step's
RATES = {  # learning rates that --lr auto tries; adapters start at zero and stand higher ones
    "lora": (3e-4, 1e-3, 3e-3),
    "spp": (1e-3, 3e-3, 1e-2),  # about the 4e-3 of arXiv:2405.16057
}
OTHER_RATES = (3e-5, 1e-4, 3e-4)  # short trials favour the highest, so it is one that lasts (docs/LOG.md)
TRIAL = 0.02  # share of the steps that the trial of a rate takes
TRIAL_STEPS = 5  # the least steps of a trial
TEXTS = 3  # texts that are evaluated by default: the training text and the demo's two


def rates_of(chosen: Recovery) -> tuple[float, ...]:
    """The learning rates that --lr auto tries."""
    return RATES.get(chosen.trainable, OTHER_RATES)


def affordable_tokens(seconds: float | int, pace: float, teacher_pace: float | None, trials: int, seq_len: int) -> int:
    """Tokens that `seconds` buy: training, evaluations, trials of rates, and a teacher's predictions.

    Trials and evaluations have a least cost, `TRIAL_STEPS` windows each and `EVALUATIONS`, for any budget.

    Args:
        pace: tokens a second that are trained on.
        teacher_pace: tokens a second that the teacher predicts; None: there is no teacher.
        trials: how many rates are tried.
    """
    teacher = 1 / teacher_pace if teacher_pace else 0.0
    least = trials * TRIAL_STEPS * seq_len + (EVALUATIONS[0] + 2) * TEXTS * HELD_OUT * seq_len * FORWARD
    by_share = seconds / ((1 + EVALUATING + trials * TRIAL) / pace + teacher)
    by_least = (seconds - least / pace) / (1 / pace + teacher)
    return max(0, int(min(by_share, by_least)))


def evaluation_steps(windows: int, steps: int, evaluated: int) -> tuple[int, ...]:
    """The steps to evaluate after: evenly spaced, as many as the budget bears, and the last one.

    Args:
        windows: how many windows are trained on.
        evaluated: how many windows an evaluation reads.
    """
    fewest, most = EVALUATIONS
    count = max(fewest, min(most, int(EVALUATING * windows / (FORWARD * max(evaluated, 1)))))
    return tuple(sorted({max(1, round(steps * n / count)) for n in range(1, count + 1)}))

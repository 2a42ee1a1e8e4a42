"""Which training windows a recovery keeps: a first training learns that, and the student is trained anew on these."""

from collections.abc import Callable
from dataclasses import replace

from billhook.recovery.setup import Prepared
from billhook.runtime import cache
from billhook.training.early_stopping import EarlyStopping
from billhook.training.text_windows import order_of
from billhook.training.window_masks import WindowMasks


def on_what_it_keeps(prepared: Prepared, rate: float, announce: Callable[[str], object]) -> Prepared:
    """The same recovery on the share of the windows that it is to keep, as learned at this rate.

    The windows are kept in its folder: all processes train, the first one writes.
    """
    env, schedule = prepared.env, prepared.schedule
    is_known = env.in_first(lambda: cache.has(env.work, "kept", {}))
    with prepared.clock("choosing windows"):
        learned = None if is_known else _learned(prepared, rate, announce)
    kept = env.in_first(lambda: cache.cached(env.work, "kept", {}, lambda: learned))
    order = [kept[n] for n in order_of(len(kept), len(schedule.order), schedule.seed)]
    return replace(prepared, schedule=replace(schedule, order=order), kept=tuple(kept))


def _learned(prepared: Prepared, rate: float, announce: Callable[[str], object]) -> list[int]:
    """The numbers of the windows to keep, after a training on all of them."""
    env, texts, share = prepared.env, prepared.texts, prepared.chosen.keep_share
    assert share is not None
    schedule = replace(prepared.schedule, lr=rate, states=False, contrast=0.0)
    count = len(texts.train)
    if env.process.is_main_process:
        tokens = len(schedule.order) * texts.train.shape[1]
        announce(f"learning which {share:.0%} of {count:,} windows to keep: {tokens:,} tokens at {rate:g}")

    def tick(stage: str, done: int, total: int) -> None:
        env.tick("choosing windows", done, total)

    trainer = prepared.trainer(schedule, EarlyStopping(()), env.work / "choosing", tick)
    masks = WindowMasks(count, share, schedule.order, schedule.rows)
    trainer.learn(masks)
    trainer.train_or_resume(announce)
    masks.replay(trainer.state.log_history)
    return masks.kept(round(share * count)).tolist()

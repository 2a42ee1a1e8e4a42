"""What patching a cut in depth is worth: python benchmarks/patch.py MODEL CALIBRATION TEXT... > patch.md

Drops whole layers, patches each cut in several ways, and prints as a Markdown table the perplexity on the first
--windows windows of every TEXT, with its factor to the unpruned model's.  --cuts names the layers, 13-18, or a preset
with how many, both:8.  --patches names WAY:damping:correction, with one of these ways:

down     `--patch linear`: the FFN's last projection before each cut
o+down   the attention's output projection of that layer first, then the FFN's on what the attention has become
every    the last projections of all FFNs that stay, as FASP does where its plan drops layers
"""

import argparse
import copy
import dataclasses
import time
from contextlib import nullcontext
from typing import Any

import results
import torch
from torch import Tensor

from billhook import data
from billhook.calibration import layer_importance
from billhook.calibration.forward import BATCH_TOKENS, enter, run_layer
from billhook.calibration.gram import gram_of
from billhook.checkpoints import load
from billhook.cuts.chopping import Settings as Patching
from billhook.cuts.chopping import chop
from billhook.cuts.narrowing import Settings as Restoring
from billhook.cuts.narrowing import narrow
from billhook.evaluation import perplexity
from billhook.math import layer_presets, restore
from billhook.models.axes import Axis, axes, reader_weight
from billhook.models.families import layers
from billhook.models.plan import Plan
from billhook.models.surgery import drop_layers
from billhook.reports.formatting import ranges
from billhook.runtime.run import Run

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("calibration")
parser.add_argument("texts", nargs="+")
parser.add_argument("--cuts", default="13-18,11-18,both:8,max-gap:8,input:8,contiguous:15", help="separated by commas")
parser.add_argument("--patches", default="none,down:1e-3:0.3", help="separated by commas")
parser.add_argument("--samples", type=int, default=64, help="windows to calibrate on")
parser.add_argument("--probes", type=int, default=4, help="windows by which presets choose")
parser.add_argument("--windows", type=int, default=24, help="score at most this many windows of each text")
parser.add_argument("--text-names", help="score these texts alone, separated by commas")
parser.add_argument("--autocast", action="store_true", help="score in bfloat16 autocast: faster on a CPU")
args = parser.parse_args()

opened = load.open_model(args.model)
drawn = data.windows(data.calibration_text(args.calibration), opened.tokenizer, 512, args.samples + args.probes, 0)
tokens, probes = drawn.tokens.split([args.samples, args.probes])
texts = [data.windows(text, opened.tokenizer, 512) for text in data.evaluation_texts(args.texts)]
texts = [one for one in texts if not args.text_names or one.source in args.text_names.split(",")]
windows = [dataclasses.replace(one, tokens=one.tokens[: args.windows]) for one in texts]


def perplexities(model: Any) -> list[float]:
    with torch.autocast("cpu", torch.bfloat16) if args.autocast else nullcontext():
        return [perplexity.perplexity(model, one).perplexity for one in windows]


@torch.no_grad()
def attention_too(model: Any, gone: tuple[int, ...], settings: Patching) -> None:
    """Before each cut, o toward goal = x + correction (dense - x) + E with x what leaves the layer, then down to the
    same goal."""
    dense, batches = copy.deepcopy(model), list(tokens.split(BATCH_TOKENS // tokens.shape[1]))
    states, calls = enter(model, batches)
    targets, at = list(states), layer_presets.layers_before(gone)
    for n in range(at[-1] + 1):
        for b in range(len(batches)):
            targets[b] = run_layer(layers(dense)[n], targets[b], calls[b][n])
        if n in gone:
            continue
        if n in at:
            goals = []
            for b, state in enumerate(states):
                x, y = run_layer(layers(model)[n], state, calls[b][n]), targets[b]
                for m in next(cut for cut in layer_presets.runs_of(gone) if cut[0] == n + 1):
                    y = run_layer(layers(dense)[m], y, calls[b][m])
                goals.append(x + settings.correction * (targets[b] - x) + y - targets[b])
            for axis in (axis for axis in axes(model, ("groups", "ffn")) if axis.layer == n):
                fit_to(model, axis, states, [call[n] for call in calls], goals, settings.damping)
        states = [run_layer(layers(model)[n], state, calls[b][n]) for b, state in enumerate(states)]
    drop_layers(model, gone)


def fit_to(model: Any, axis: Axis, states: list[Tensor], calls: list[Any], goals: list[Tensor], damping: float) -> None:
    """Refit the reader so that its layer puts out the goals, as if what it puts out entered nothing else in the
    layer."""
    W, seen = reader_weight(model, axis), []
    G = torch.zeros(W.shape[1], W.shape[1], dtype=torch.float64)
    C = torch.zeros(W.shape, dtype=torch.float64)
    hook = model.get_submodule(axis.reader_module).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for state, call, goal in zip(states, calls, goals, strict=True):
        lack = goal - run_layer(layers(model)[axis.layer], state, call)
        x = seen.pop().flatten(0, -2)
        G += gram_of(x)
        C += lack.flatten(0, -2).T @ x
    hook.remove()
    W.copy_(restore.least_squares(W, G, torch.arange(len(G)), damping, C)[0])


def patch(model: Any, gone: tuple[int, ...], way: str, damping: float, correction: float) -> Any:
    plan = Plan(layers=gone)
    settings = Patching("linear", damping, correction)
    if way == "down":
        return chop(model, tokens, plan, settings, Run())
    if way == "every":
        return narrow(model, tokens, plan, Restoring(damping=damping, correction=correction), Run())
    return attention_too(model, gone, settings)


def layers_of(name: str) -> tuple[int, ...]:
    preset, _, count = name.partition(":")
    if not count:
        return tuple(layer_presets.parse_layers(name.replace("+", ","), len(layers(opened.model))))
    return tuple(layer_importance.chosen(opened.model, preset, int(count), tokens, probes, Run()))


def keep(measured: list[float], **cell: Any) -> None:
    how = {name: getattr(args, name) for name in ("model", "calibration", "samples", "windows", "autocast")}
    texts_of = zip(windows, measured, base, strict=True)
    rows = [{"text": text.source, "perplexity": p, "factor": p / dense} for text, p, dense in texts_of]
    results.write("patch", [{**how, **cell, **row} for row in rows])


base = perplexities(opened.model)
print("| layers gone | patch | damping | correction | " + " | ".join(f"{one.source} | ×" for one in windows), end=" |")
print(" error → patched, held out | seconds |")
print("|---|---|---|---|" + "---|---|" * len(windows) + "---|---|")
print("| none | | | | " + " | ".join(f"{p:.2f} | 1" for p in base) + " | | |", flush=True)
keep(base)
for cut in args.cuts.split(","):
    gone = layers_of(cut)
    for one in args.patches.split(","):
        way, damping, correction = [*one.split(":"), "", ""][:3]
        model, started, achieved = copy.deepcopy(opened.model), time.perf_counter(), None
        if way == "none":
            drop_layers(model, gone)
        else:
            achieved = patch(model, gone, way, float(damping), float(correction))
        took = time.perf_counter() - started
        measured = perplexities(model)
        found = " | ".join(f"{p:.2f} | {p / dense:.3f}" for p, dense in zip(measured, base, strict=True))
        off = "; ".join(
            f"{c.layer}: {c.error_without:.3f} → {c.error:.3f}, {c.error_held_out:.3f}"
            for c in (achieved or [] if way == "down" else [])
        )
        print(
            f"| {ranges(gone)} ({cut}) | {way} | {damping} | {correction} | {found} | {off} | {took:.0f} |", flush=True
        )
        how = {"layers": ranges(gone), "cut": cut, "patch": way, "damping": damping, "correction": correction}
        keep(measured, errors=off, seconds=took, **how)

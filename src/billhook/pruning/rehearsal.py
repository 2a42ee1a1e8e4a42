"""What a layer of a model costs to prune on this machine:
the prune itself, on one and on two random layers of its shapes.

The second layer is what every further one costs.  Where a layer would take long, it is rehearsed on shorter windows and
with a narrower FFN: passes grow by weights, Grams by squares of what enters them, all else as its operations do from
width to width.
"""

import copy
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from billhook.calibration.forward import BATCH_TOKENS, enter, run_layer
from billhook.checkpoints.resume import FinishedLayers
from billhook.checkpoints.streaming import bare
from billhook.evaluation.speed import synchronise
from billhook.models.axes import axes
from billhook.models.experts import unfuse
from billhook.models.families import attention, family_of, layers, linear, row_of, shape
from billhook.models.plan import Plan
from billhook.models.sizes import layer_parameters
from billhook.models.surgery import drop_layers
from billhook.planning.method import Method, Planned
from billhook.planning.texts import Texts
from billhook.runtime.memory import peak_growth
from billhook.runtime.progress import Clock, least_seconds
from billhook.runtime.run import Run
from billhook.tensors import Tokens
from billhook.training import refinement

WINDOWS = 10  # windows of a rehearsal: one in ten is held out
ABOUT = 16.0  # seconds that all of it may take, where a layer lets it
PASSES, SOLVES = 8, 8  # a rehearsal's rough count: passes over a layer's weights, cubes of its Grams
SHORTEST, LARGEST = 32, 8  # tokens of a window, and divisor of the width
MULTIPLE = 32
VOCABULARY = 256
ROWS = 4096  # rows of a head that are timed
BY_TOKEN = ("forward", "gram")  # stages that grow with the text; the others do not
GROWS = {"forward": "weights", "saving": "weights", "surgery": "weights", "gram": "squares"}
DEGREE = 3  # of the polynomial that a layer's operations are in its FFN's width: factorisations
STEP, BATCH = (2, 1), (2, 32)  # windows and tokens of a forward pass with a cache, and of a short one


@dataclass(frozen=True)
class Cost:
    """Of one pass of something."""

    seconds: float
    flops: float


@dataclass(frozen=True)
class Rehearsed:
    """What the first layer and every further one cost, by stage, at the whole width, on all of the text."""

    first: Mapping[str, Cost]
    further: Mapping[str, Cost]
    work_bytes: int  # memory a layer takes besides its weights and hidden states
    shrunk: int  # what the FFN's width was divided by


@torch.no_grad()
def rehearse(
    whole: Any, read: tuple[int, int], played: tuple[Method, Planned], dtype: torch.dtype, device: torch.device
) -> Rehearsed:
    """Time a cut on random layers of a model's shapes.

    Args:
        whole: the model, without weights.
        read: windows that it calibrates on, and tokens in each.
        played: the method, and its plan of the whole model; of the layers that have what it cuts, the last two are
        rehearsed.
        dtype: to compute in.
    """
    method, planned = played
    plan, play = planned.plan, Play(method, planned, _most(whole, planned.plan))
    samples, seq_len = read
    windows = min(samples, WINDOWS)
    length, factor = _chosen_sizes(whole, play, seq_len, device)
    config, cut = _narrow(whole.config, factor), cut_layers(whole, plan)
    order = sorted(range(len(layers(whole))), key=lambda n: (n in cut, n))  # those that are cut come last
    one, two = order[-1:], order[-2:]
    tokens = torch.randint(VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(0))
    model = random_layers(config, one, dtype, device)
    small = Shapes.of(model, play)
    few = tokens[:, :SHORTEST]  # by which operations are counted, apart, for it takes time; and all is warm then

    def count(config: Any, numbers: Collection[int]) -> dict[str, float]:
        return _counted(random_layers(config, numbers, dtype, device), play, few)

    counted = [count(config, numbers) for numbers in (one, two)]
    alone, work = _timed(model, play, tokens)
    both, _ = _timed(random_layers(config, two, dtype, device), play, tokens)
    text, grown = samples * seq_len, dict[str, float]()
    if factor > 1 and _width(whole.config):
        narrower = [_narrow(whole.config, factor * 2**by) for by in range(1, DEGREE + 1)]
        grown = by_width(
            _width(whole.config), {_width(config): counted[1]} | {_width(c): count(c, two) for c in narrower}
        )
    grown |= Shapes.of(whole, play).over(small)
    attends = 1 + _attention_share(whole, seq_len)  # which the counter passes by
    first, further = {}, {}
    for stage in both:
        times = grown.get(stage, grown["forward"])  # where no operation is counted, numbers are compared and moved
        by_time, by_count = (text / n.numel() if stage in BY_TOKEN else 1.0 for n in (tokens, few))
        by_count *= attends if stage == "forward" else 1.0
        seconds = [found.get(stage, 0.0) * times * by_time for found in (alone, both)]
        flops = [found.get(stage, 0.0) * times * by_count for found in counted]
        if stage == "forward":  # the first layer takes less: nothing before it is pruned
            first[stage] = Cost(seconds[0], flops[0])
            further[stage] = Cost(max(0.0, seconds[1] - seconds[0]), flops[1] - flops[0])
        else:
            alike = min(len(cut), 2)
            first[stage] = further[stage] = Cost(seconds[1] / alike, flops[1] / alike)
    return Rehearsed(first, further, round(work * grown["gram"]), factor)


def by_width(whole: int, counted: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """By stage, how many times the operations at the first of some widths those at the width `whole` are.

    They are a polynomial in the width, none of whose terms is negative: what reads an FFN is factored by its cube, and
    multiplied by its Gram by its square; what writes one grows with it; attention does not.
    """
    widths, found = np.array(list(counted)) / whole, {}
    for stage, first in next(iter(counted.values())).items():
        operations = np.array([one.get(stage, 0.0) for one in counted.values()])
        if operations.all():
            terms, _ = nnls(widths[:, None] ** np.arange(DEGREE + 1) / operations[:, None], np.ones(len(widths)))
            found[stage] = float(terms.sum() / first)
    return found


def cut_layers(model: Any, plan: Plan) -> list[int]:
    """The layers that have what a plan cuts: in a mixture some may be without experts; all, where it cuts no axis."""
    return sorted({axis.layer for axis in axes(model, plan.kinds)}) or list(range(len(layers(model))))


def _attention_share(model: Any, length: int) -> float:
    """Operations of scores and values in the last layer, as a share of those of its weights."""
    if not row_of(model).attention:  # a derived row says nothing of it
        return 0.0
    one = attention(model, len(layers(model)) - 1)
    weights = sum(p.numel() for p in layers(model)[-1].parameters() if p.ndim > 1)
    return 2 * length * one.heads * one.head_dim / weights


@torch.no_grad()
def window_seconds(whole: Any, dtype: torch.dtype, device: torch.device, length: int) -> tuple[float, float, float]:
    """Of one window through a layer, through the head, and through a layer that is refined."""
    model = random_layers(whole.config, [len(layers(whole)) - 1], dtype, device)
    (state,), (calls,) = enter(model, [torch.zeros(1, length, dtype=torch.long)])
    weight = whole.get_output_embeddings().weight
    rows = torch.randn(min(len(weight), ROWS), weight.shape[1], dtype=dtype, device=device)
    logits = least_seconds(lambda: (state[0] @ rows.T, synchronise(device))) * len(weight) / len(rows)
    passed = least_seconds(lambda: (run_layer(layers(model)[0], state, calls[0]), synchronise(device)))
    with refinement.rehearsed(model, 0, state, calls[0]) as step:
        return passed, logits, least_seconds(lambda: (step(), synchronise(device)))


@torch.no_grad()
def passes(whole: Any, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Seconds of one layer for one token of two texts, and for 32 tokens of each."""
    model = random_layers(whole.config, [len(layers(whole)) - 1], dtype, device)
    state, calls = enter(model, [torch.zeros(shape, dtype=torch.long) for shape in (STEP, BATCH)])
    step, batch = (least_seconds(lambda n=n: run_layer(layers(model)[0], state[n], calls[n][0])) for n in range(2))
    return step, batch


def random_layers(config: Any, numbers: Collection[int], dtype: torch.dtype, device: torch.device) -> Any:
    """Some layers of a random model, with a small vocabulary and no head."""
    model = bare(copy.deepcopy(config), dtype)
    unfuse(model)
    drop_layers(model, set(range(len(layers(model)))) - set(numbers))
    width = model.get_input_embeddings().weight.shape[1]
    model.set_input_embeddings(nn.Embedding(VOCABULARY, width, dtype=dtype, device=device))
    head = model.get_output_embeddings()
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None and param.is_meta and module is not head:
                made = torch.empty(param.shape, dtype=dtype).normal_(0, param.shape[-1] ** -0.5, generator=generator)
                module._parameters[name] = nn.Parameter((made if param.ndim > 1 else made + 1).to(device), False)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Play:
    """What is rehearsed: a method's cut, of as much of every layer as of the one that loses most."""

    method: Method
    planned: Planned
    shares: Mapping[str, float]  # of units, by kind

    def __call__(self, model: Any, tokens: Tokens, clock: Clock) -> None:
        """The prune itself, in place; what is done is written and thrown away."""
        with tempfile.TemporaryDirectory() as folder:
            run = Run(clock=clock, finished=FinishedLayers(Path(folder), model))
            part = self.method.part(replace(self.planned, plan=_own_plan(model, self.shares)))
            self.method.carry_out(model, Texts(tokens, tokens[:0]), part, run)


def _timed(model: Any, play: Play, tokens: Tokens) -> tuple[dict[str, float], int]:
    """Seconds of every stage, and by how many bytes memory grows."""
    clock = Clock()
    with peak_growth(model.get_input_embeddings().weight.device) as growth:
        play(model, tokens, clock)
    return clock.seconds, growth()


def _counted(model: Any, play: Play, tokens: Tokens) -> dict[str, float]:
    """Operations of every stage."""
    counter = FlopCounterMode(display=False, custom_mapping=UNCOUNTED)
    clock = _Counting(counter)
    with counter:
        play(model, tokens, clock)
    return clock.flops


class _Counting(Clock):
    """Operations by stage, too."""

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self.counter, self.flops, self._counted = counter, dict[str, float](), 0.0

    def _charge(self) -> None:
        now = float(self.counter.get_total_flops())
        if self._open:
            self.flops[self._open[-1]] = self.flops.get(self._open[-1], 0.0) + now - self._counted
        self._counted = now
        super()._charge()


def _cholesky(shape: Any, *_: Any, **__: Any) -> int:
    return shape[-1] ** 3 // 3


def _by_triangle(right: Any, *_: Any, **__: Any) -> int:
    return right[-2] ** 2 * right[-1]


aten = torch.ops.aten
UNCOUNTED = {  # which torch does not count
    aten.linalg_cholesky_ex: _cholesky,
    aten.cholesky_solve: lambda right, *_, **__: 2 * _by_triangle(right),
    aten.linalg_solve_triangular: lambda _, right, *__, **___: _by_triangle(right),
    aten.cholesky_inverse: lambda shape, *_, **__: 2 * shape[-1] ** 3 // 3,
}


@dataclass(frozen=True)
class Shapes:
    """What the cost of a layer grows with, of the last that is cut:
    its weights, and the squares and cubes of what enters its readers."""

    weights: int
    squares: int
    cubes: int

    @classmethod
    def of(cls, model: Any, play: Play) -> "Shapes":
        last = cut_layers(model, play.planned.plan)[-1]
        names = [name for n, name in play.method.solved(model, play.planned) if n == last]
        sizes = [shape(linear(model, name))[1] for name in names]
        return cls(layer_parameters(model, last), sum(n**2 for n in sizes), sum(n**3 for n in sizes))

    def over(self, other: "Shapes") -> Mapping[str, float]:
        """By stage, how many times what `other` costs."""
        pairs = {stage: (getattr(self, size), getattr(other, size)) for stage, size in GROWS.items()}
        return {stage: own / its if its else 1.0 for stage, (own, its) in pairs.items()}


def _chosen_sizes(model: Any, play: Play, seq_len: int, device: torch.device) -> tuple[int, int]:
    """Tokens of a window, and by what to divide the FFN's width, for a rehearsal that does not take long."""
    square = torch.randn(1024, 1024, device=device)
    rate = 2 * 1024**3 / least_seconds(lambda: square @ square)
    # windows that are fitted on make one batch: every batch costs something whatever its size
    whole, length, factor = Shapes.of(model, play), min(seq_len, BATCH_TOKENS // (WINDOWS - 1)), 1
    while length > SHORTEST and PASSES * 2 * WINDOWS * length * whole.weights / rate > ABOUT / 2:
        length //= 2
    while factor < LARGEST and SOLVES * whole.cubes / factor**3 / rate > ABOUT / 2:
        factor *= 2
    return length, factor


def _narrow(config: Any, factor: int) -> Any:
    """A config of a narrower FFN, where it has a key for that."""
    small = copy.deepcopy(config)
    if factor > 1 and (width := _width(config)):
        setattr(
            small, family_of(config.model_type).keys["width"], max(MULTIPLE, width // factor // MULTIPLE * MULTIPLE)
        )
    return small


def _width(config: Any) -> int:
    """Of the FFN; 0 where the config has no key for it."""
    width = getattr(config, family_of(config.model_type).keys.get("width", ""), None)
    return width if isinstance(width, int) else 0


def _most(model: Any, plan: Plan) -> dict[str, float]:
    """By kind, the share of their units that the layers lose that lose most: the first ones may be spared."""
    shares = dict.fromkeys(plan.kinds, 0.0)
    for axis in axes(model, plan.kinds):
        shares[axis.kind] = max(shares[axis.kind], plan.drops.get((axis.layer, axis.kind), 0) / axis.units)
    return shares


def _own_plan(model: Any, shares: Mapping[str, float]) -> Plan:
    """So much of every layer, as far as it fits."""
    drops = {}
    for axis in axes(model, tuple(shares)):
        block = axis.units // axis.blocks
        drops[axis.layer, axis.kind] = min(round(shares[axis.kind] * block), block - 1) * axis.blocks
    return Plan(drops)

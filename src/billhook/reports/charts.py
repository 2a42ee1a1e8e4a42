"""Charts as inline SVG text, from plain numbers: curves with error bars, and steps layer by layer.

A chart is drawn for one width in CSS pixels, so that its letters are as large as the text around it: a page holds one
for phones and one for wider screens and shows either (`STYLE`).  Colours are CSS variables with fallbacks; every series
has a marker or a dash of its own too.  Numbers that are None or not finite are left out.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

from billhook.reports.scales import Axis, Number, Scale, fit

NARROW, WIDE = 340, 760
FONT = 12.5
LETTER = 0.62 * FONT  # width of a letter in the widest common sans-serif face, which labels are placed for
LINE = 18
# colours of lines: colour-blind readers can tell them apart, and their contrast with the page is at least 4.5 : 1
LIGHT = ("#0072b2", "#c44e00", "#00795a", "#a8487e", "#8a6100", "#5a6572")
DARK = ("#5ab4e8", "#f58c4b", "#3cc79d", "#e59bc8", "#e3b53f", "#a9b4c0")
# their number and that of the colours have no common divisor, so that pairs repeat late
MARKS = ("circle", "square", "triangle", "diamond", "wedge", "plus", "cross")
MARKED = 24  # the most points of a line that get marks; with more the line alone is clearer
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4")
SHAPES = {
    "circle": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0Z",
    "square": "M-3.7-3.7H3.7V3.7H-3.7Z",
    "triangle": "M0-5L4.6 3.6H-4.6Z",
    "diamond": "M0-5.4L5 0L0 5.4L-5 0Z",
    "wedge": "M0 5L4.6-3.6H-4.6Z",
    "plus": "M-1.5-5H1.5V-1.5H5V1.5H1.5V5H-1.5V1.5H-5V-1.5H-1.5Z",
    "cross": "M-4.5-2.4L-2.4-4.5L0-2.1L2.4-4.5L4.5-2.4L2.1 0L4.5 2.4L2.4 4.5L0 2.1L-2.4 4.5L-4.5 2.4L-2.1 0Z",
    "star": "M0-7L1.8-2.2L6.9-2.2L2.8 1L4.3 6L0 3L-4.3 6L-2.8 1L-6.9-2.2L-1.8-2.2Z",
}
_VARIABLES = [";".join(f"--c{n}:{colour}" for n, colour in enumerate(colours)) for colours in (LIGHT, DARK)]
STYLE = (
    f":root{{{_VARIABLES[0]}}}@media screen and (prefers-color-scheme:dark){{:root{{{_VARIABLES[1]}}}}}"
    ".chart{display:block;width:100%;height:auto;overflow:visible;color:inherit}"
    f".chart text{{font-size:{FONT}px;fill:currentColor;font-variant-numeric:tabular-nums}}"
    ".chart .grid{stroke:currentColor;opacity:.14}.chart .base{stroke:currentColor;opacity:.5}"
    ".chart .soft{opacity:.78}.chart .halo{stroke:var(--page,#fff);stroke-width:1.2}"
    ".chart .dense{stroke:currentColor;stroke-dasharray:1 4;stroke-linecap:round;stroke-width:1.6;opacity:.75}"
    ".narrow.chart{max-width:30rem;margin-inline:auto}.wide.chart{display:none}"
    "@media print,(min-width:44rem){.wide.chart{display:block}.narrow.chart{display:none}}"
)
PICTURE = (  # of a wide chart that is a file of its own: always shown, in ink that suits the page around it
    f"{STYLE}.wide.chart{{display:block}}svg.chart{{color:#1f2328;font-family:sans-serif}}"
    "@media(prefers-color-scheme:dark){svg.chart{color:#e6edf3}}"
)


@dataclass(frozen=True)
class Point:
    x: Number
    y: Number | None
    error: Number | None = None


@dataclass(frozen=True)
class Series:
    """A line; `level` is a dotted height right across in its colour: the value that it should come to.

    `drawn` as a line from point to point, as `steps` that hold a value until the next, or as `points` alone.
    """

    name: str
    points: Sequence[Point]
    level: Number | None = None
    drawn: str = "line"


@dataclass(frozen=True)
class Band:
    """An interval of x, and what lies in it: a knee."""

    low: Number
    at: Number
    high: Number
    label: str


@dataclass(frozen=True)
class End:
    """The last point of a line and its name, which stands beside it in its colour, or with a swatch in a legend."""

    name: str
    point: Point
    colour: str
    swatch: str


@dataclass(frozen=True)
class Frame:
    """Where on the page a chart plots, and how wide it is as a whole."""

    x: Scale
    y: Scale
    width: int


def curves(
    title: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    reference: Series | None = None,
    band: Band | None = None,
    width: int = WIDE,
) -> str:
    """One line a series, with markers and error bars; `reference` (one point) is marked, its height drawn right across.

    An empty string where there is nothing to draw.
    """
    drawn = [replace(s, points=sorted(filter(_drawable(y), s.points), key=lambda p: p.x)) for s in series]
    drawn = [s for s in drawn if s.points]
    mark = next(filter(_drawable(y), reference.points), None) if reference else None
    points = [p for s in drawn for p in s.points]
    if not points:
        return ""
    levels = [p for s in drawn for p in _level(s, y)]
    everything = [*points, *levels, *([mark] if mark else [])]
    heights = [float(p.y or 0) for p in everything]
    heights += [bound for p in everything for bound in _bar(p) if not y.log or bound > 0]
    far = max(heights) > y.most
    heights = [min(h, y.most) for h in heights]
    across = [float(p.x) for p in everything] + ([band.low, band.high] if band else [])
    names = [s.name for s in drawn] + ([reference.name] if reference and mark else [])
    height, top = (230 if width < WIDE else 320), 30 + LINE * (far or band is not None)  # room for arrows or a label
    beside = width >= WIDE and len(names) * LINE < height
    right = width - (min(max(map(len, names)), 26) * LETTER + 30 if beside else 14)
    up = fit(heights, top + height, top, y.log)
    left = max(len(y.tick(t)) for t in [*up.ticks(7), 0.1]) * LETTER + 10
    frame = Frame(fit(across, left, right, room=0.04), up, width)
    body = [_grid(frame, x, y)]
    if band:
        body.append(_band(frame, band, x))
    curve = [_curve(frame, n, s, x, y) for n, s in enumerate(drawn)]
    body += _reference(frame, mark, curve) if mark else curve
    ends = [End(_short(s.name), s.points[-1], _colour(n), _swatch(n, s)) for n, s in enumerate(drawn)]
    ends += [End(_short(reference.name), mark, "currentColor", _dense_swatch())] if reference and mark else []
    if beside:
        body.append(_beside(frame, ends))
        foot = top + height + 46
    else:
        keys, foot = _legend([(end.name, end.swatch) for end in ends], top + height + 62, width)
        body.append(keys)
    described = [reference, *drawn] if reference and mark else drawn
    return _svg(title, "; ".join(_told(s, x, y) for s in described), body, width, foot)


def layers(
    title: str, rows: Mapping[str, Sequence[Number | None]], y: Axis, dropped: Sequence[int] = (), width: int = WIDE
) -> str:
    """Values layer by layer as steps from 0, the last row filled; `dropped` layers are marked on the axis."""
    kept = {name: [v if v is not None and math.isfinite(v) else None for v in row] for name, row in rows.items()}
    kept = {name: row for name, row in kept.items() if any(v is not None for v in row)}
    if not kept:
        return ""
    count = max(map(len, kept.values()))
    highest = max(v for row in kept.values() for v in row if v is not None)
    height, top = (120 if width < WIDE else 150), 30
    left = 6 * LETTER + 6  # the same in all charts, which stand below one another
    across = Scale(0, count, left, width - 14)
    up = Scale(0, highest * 1.06 if highest > 0 else 1.0, top + height, top)
    frame = Frame(across, up, width)
    body = [_grid(frame, Axis("layer"), y, _layer_ticks(count, width))]
    for n, row in enumerate(kept.values()):
        body.append(_steps(frame, len(kept) - 1 - n, row))
    for layer in dropped:
        body.append(f'<path class="base" d="{_cross(across.at(layer + 0.5), top + height - 5)}" stroke-width="1.6"/>')
    entries = [(name, _step_swatch(len(kept) - 1 - n)) for n, name in enumerate(kept)] if len(kept) > 1 else []
    keys, foot = _legend(entries, top + height + 62, width)
    described = "; ".join(_told_layers(name, row, y) for name, row in kept.items())
    described += f"; dropped layers: {', '.join(map(str, dropped))}" if dropped else ""
    return _svg(title, described, [*body, keys], width, foot if entries else top + height + 46)


def _drawable(y: Axis) -> Callable[[Point], bool]:
    return lambda p: p.y is not None and math.isfinite(p.y) and math.isfinite(p.x) and (p.y > 0 or not y.log)


def _level(series: Series, y: Axis) -> list[Point]:
    """Where a series' level is to be drawn, if it has one."""
    return [p for p in (Point(series.points[-1].x, series.level),) if _drawable(y)(p)]


def _marked(series: Series) -> bool:
    return series.drawn == "points" or (series.drawn == "line" and len(series.points) <= MARKED)


def _bar(point: Point) -> tuple[float, float]:
    """The ends of a point's error bar."""
    height, error = float(point.y or 0), float(point.error or 0)
    error = error if math.isfinite(error) else 0.0
    return height - error, height + error


def _svg(title: str, description: str, body: Sequence[str], width: int, height: Number) -> str:
    kind = "narrow" if width < WIDE else "wide"
    return (
        f'<svg class="chart {kind}" role="img" viewBox="0 0 {width} {_n(height)}" '
        f'width="{width}" height="{_n(height)}" '
        f'xmlns="http://www.w3.org/2000/svg"><title>{escape(title)}</title><desc>{escape(description)}</desc>'
        f"{''.join(body)}</svg>"
    )


def _grid(frame: Frame, x: Axis, y: Axis, x_ticks: Sequence[Number] | None = None) -> str:
    """Lines at the ticks of y, numbers on both axes, and the names of the axes."""
    left, right, bottom = frame.x.start, frame.x.end, frame.y.start
    log, room = ", log scale" if y.log else "", int(frame.width / LETTER)
    out = [_text(0, 12, _short(y.label, room - len(log)) + log, cls="soft")]
    for tick in frame.y.ticks(7 if frame.width >= WIDE else 5):
        if y.whole and tick % 1:
            continue
        at = frame.y.at(tick)
        out.append(f'<path class="grid" d="M{_n(left)} {_n(at)}H{_n(right)}"/>')
        out.append(_text(left - 7, at + 4, y.tick(tick), "end", "soft"))
    out.append(f'<path class="base" d="M{_n(left)} {_n(bottom)}H{_n(right)}"/>')
    half = 0.5 if x_ticks is not None else 0  # a layer's number stands below the middle of its step
    for tick in frame.x.ticks(9 if frame.width >= WIDE else 5) if x_ticks is None else x_ticks:
        if x.whole and tick % 1:
            continue
        out.append(_text(frame.x.at(tick + half), bottom + LINE, x.tick(tick), "middle", "soft"))
    out.append(_text(right, bottom + 2 * LINE + 4, _short(x.label, int((right - left) / LETTER)), "end", "soft"))
    return "".join(out)


def _curve(frame: Frame, n: int, series: Series, x: Axis, y: Axis) -> str:
    colour = _colour(n)
    places = [(frame.x.at(p.x), frame.y.at(p.y or 0)) for p in series.points]
    move = "H{}V{}" if series.drawn == "steps" else "L{} {}"
    line = "M{} {}".format(*map(_n, places[0])) + "".join(move.format(_n(a), _n(b)) for a, b in places[1:])
    out = [f'<path d="{line}" {_stroke(n, 2 if _marked(series) else 1.6)}/>'] * (series.drawn != "points")
    for level in _level(series, y):
        across = f"M{_n(frame.x.start)} {_n(frame.y.at(level.y or 0))}H{_n(frame.x.end)}"
        out.append(f'<path class="dense" d="{across}" style="stroke:{colour}"/>')
    for point, (a, b) in zip(series.points, places, strict=True):
        if (point.y or 0) > y.most:
            out.append(f'<path d="M{_n(a)} {_n(b - 10)}v-11m-4 5l4-5l4 5" {_stroke(n, 1.6, solid=True)}/>')
        low, high = (frame.y.at(max(v, frame.y.low)) for v in _bar(point))
        if low - high > 1:
            bar = f"M{_n(a)} {_n(low)}V{_n(high)}M{_n(a - 4)} {_n(low)}h8M{_n(a - 4)} {_n(high)}h8"
            out.append(f'<path d="{bar}" fill="none" style="stroke:{colour}" stroke-width="1.4"/>')
        if _marked(series):
            out.append(f"<g><title>{escape(f'{series.name}: {_said(point, x, y)}')}</title>{_mark(n, a, b)}</g>")
    return "".join(out)


def _reference(frame: Frame, point: Point, curve: Sequence[str]) -> list[str]:
    """The height of the reference, below the curves, and its mark, above them, since a curve may start there."""
    a, b = _n(frame.x.at(point.x)), _n(frame.y.at(point.y or 0))
    line = f'<path class="dense" d="M{_n(frame.x.start)} {b}H{_n(frame.x.end)}"/>'
    mark = f'<path class="halo" d="{SHAPES["star"]}" transform="translate({a} {b})" fill="currentColor"/>'
    return [line, *curve, mark]


def _band(frame: Frame, band: Band, x: Axis) -> str:
    """The interval, shaded, with a line in its middle and a label above the plot, where no curve runs."""
    low, at, high = (frame.x.at(v) for v in (band.low, band.at, band.high))
    top, bottom = frame.y.end, frame.y.start
    label = f"{band.label} {x.exact(band.at)}"
    half = len(label) * LETTER / 2
    middle = min(max(at, half), frame.width - half)
    return (
        f'<rect x="{_n(low)}" y="{_n(top)}" width="{_n(max(high - low, 1.5))}" height="{_n(bottom - top)}" '
        f'fill="currentColor" opacity=".1"/><path class="base" d="M{_n(at)} {_n(top)}V{_n(bottom)}"/>'
        + _text(middle, top - 7, label, "middle")
    )


def _beside(frame: Frame, ends: Sequence[End]) -> str:
    """Names at the right edge, each as near to the end of its line as the others allow, joined to it by a thin line."""
    order = sorted(ends, key=lambda end: frame.y.at(end.point.y or 0))
    placed: list[float] = []
    for end in order:
        wanted = frame.y.at(end.point.y or 0)
        placed.append(max(wanted, placed[-1] + LINE) if placed else wanted)
    limit = float(frame.y.start)
    for n in reversed(range(len(placed))):
        placed[n] = min(placed[n], limit)
        limit = placed[n] - LINE
    out, edge = [], frame.x.end
    for end, at in zip(order, placed, strict=True):
        a, b = frame.x.at(end.point.x), frame.y.at(end.point.y or 0)
        if end.colour != "currentColor":  # the unpruned model's height is drawn right across already
            out.append(f'<path class="grid" d="M{_n(a + 7)} {_n(b)}L{_n(edge + 4)} {_n(at)}" fill="none"/>')
        out.append(_text(edge + 8, at + 4, end.name, colour=end.colour))
    return "".join(out)


def _legend(entries: Sequence[tuple[str, str]], top: Number, width: int) -> tuple[str, Number]:
    """Swatches with names, in as many rows as they need; the height at which they end."""
    left, at, out = 0.0, top, []
    for name, swatch in entries:
        name = _short(name, int((width - 34) / LETTER))
        need = 34 + len(name) * LETTER + 14
        if left and left + need > width + 14:
            left, at = 0.0, at + LINE + 2
        out.append(f'<g transform="translate({_n(left)} {_n(at - 4)})">{swatch}</g>{_text(left + 34, at, name)}')
        left += need
    return "".join(out), at + 8


def _steps(frame: Frame, n: int, row: Sequence[Number | None]) -> str:
    """One row as a staircase, number 0 filled; a layer without a number leaves a gap."""
    line, area, base, last = [], [], _n(frame.y.start), None
    for layer, value in enumerate(row):
        if value is not None:
            a, b, at = _n(frame.x.at(layer)), _n(frame.x.at(layer + 1)), _n(frame.y.at(value))
            line.append(f"V{at}H{b}" if last is not None else f"M{a} {at}H{b}")
            area.append(f"M{a} {base}V{at}H{b}V{base}Z")
        last = value
    fill = f'<path d="{"".join(area)}" style="fill:{_colour(n)}" opacity=".22"/>' if n == 0 else ""
    return f'{fill}<path d="{"".join(line)}" {_stroke(n, 1.6)}/>'


def _layer_ticks(count: int, width: int) -> list[int]:
    most = 16 if width >= WIDE else 8
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, count) if (count - 1) // s < most or s >= count)
    return list(range(0, count, step))


def _stroke(n: int, width: Number, solid: bool = False) -> str:
    dash = "" if solid or not DASHES[n % len(DASHES)] else f' stroke-dasharray="{DASHES[n % len(DASHES)]}"'
    return f'fill="none" style="stroke:{_colour(n)}" stroke-width="{width}" stroke-linejoin="round"{dash}'


def _swatch(n: int, series: Series) -> str:
    line = f'<path d="M0 0H28" {_stroke(n, 2)}/>' if series.drawn != "points" else ""
    return f"{line}{_mark(n, 14, 0) if _marked(series) else ''}"


def _step_swatch(n: int) -> str:
    fill = f'<path d="M0-5H28V5H0Z" style="fill:{_colour(n)}" opacity=".22"/>' if n == 0 else ""
    return f'{fill}<path d="M0 {-5 if n == 0 else 0}H28" {_stroke(n, 1.6)}/>'


def _dense_swatch() -> str:
    return (
        f'<path class="dense" d="M0 0H28"/><path d="{SHAPES["star"]}" transform="translate(14 0)" fill="currentColor"/>'
    )


def _mark(n: int, a: Number, b: Number) -> str:
    shape = SHAPES[MARKS[n % len(MARKS)]]
    return f'<path class="halo" d="{shape}" transform="translate({_n(a)} {_n(b)})" style="fill:{_colour(n)}"/>'


def _cross(a: Number, b: Number) -> str:
    return f"M{_n(a - 3)} {_n(b - 3)}l6 6M{_n(a + 3)} {_n(b - 3)}l-6 6"


def _colour(n: int) -> str:
    return f"var(--c{n % len(LIGHT)},{LIGHT[n % len(LIGHT)]})"


def _text(a: Number, b: Number, text: str, anchor: str = "", cls: str = "", colour: str = "") -> str:
    more = (f' text-anchor="{anchor}"' if anchor else "") + (f' class="{cls}"' if cls else "")
    more += f' style="fill:{colour}"' if colour else ""
    return f'<text x="{_n(a)}" y="{_n(b)}"{more}>{escape(text)}</text>'


def _short(name: str, most: int = 26) -> str:
    return name if len(name) <= most else name[: max(most - 1, 1)] + "…"


def _n(value: Number) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _said(point: Point, x: Axis, y: Axis) -> str:
    error = f" ± {y.exact(point.error)}" if point.error is not None and math.isfinite(point.error) else ""
    return f"{y.exact(point.y or 0)}{error} at {x.exact(point.x)}"


def _told(series: Series, x: Axis, y: Axis) -> str:
    level = "".join(f", dotted at {y.exact(p.y or 0)}" for p in _level(series, y))
    return f"{series.name}: " + ", ".join(_said(p, x, y) for p in filter(_drawable(y), series.points)) + level


def _told_layers(name: str, row: Sequence[Number | None], y: Axis) -> str:
    known = [(value, layer) for layer, value in enumerate(row) if value is not None]
    (low, at_low), (high, at_high) = min(known), max(known)
    if low == high:
        return f"{name}: {y.exact(low)} in each of {len(known)} layers"
    mean = sum(value for value, _ in known) / len(known)
    return f"{name}: mean {y.exact(mean)}, from {y.exact(low)} (layer {at_low}) to {y.exact(high)} (layer {at_high})"


def both(chart: Callable[..., str], *args: object, **kwargs: object) -> str:
    """A chart for phones and one for wider screens; the style shows one of them."""
    return "".join(chart(*args, width=width, **kwargs) for width in (NARROW, WIDE))

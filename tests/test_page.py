"""report.html: well-formed, escaped, self-contained, complete; and as Chromium shows it on a phone, wide, light and dark."""

import copy
import html
import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import example_reports as examples
import pytest

from billhook.pages import charts, page, tables
from billhook.pages.charts import NARROW, WIDE, Axis, Band, Point, Series
from billhook.pages.scales import fit, linear_ticks, log_ticks, written

VOID = {"meta", "br", "wbr", "hr", "img", "link", "input"}
SVG = re.compile(r"<svg .*?</svg>", re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
NASTY = '<script>alert("1")</script>&<b>\x00\ud800" onload="x'
EVIL = {"long": "a_very-long.name/" * 12, "script": NASTY}
Report = dict[str, Any]


class Strict(HTMLParser):
    """Every tag closed where it should be; text and tags gathered."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open  # elsewhere HTML knows no such thing
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    def text(self) -> str:
        return " ".join("".join(self.words).replace("\u00a0", " ").split())


def headings(shown: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", shown)


def broken(report: Report) -> Report:
    """The same with infinite, missing and undefined numbers where a broken model has them."""
    report = copy.deepcopy(report)
    for record in report["models"][1:] + report["points"][-1:]:
        for n, score in enumerate(record["perplexities"]):
            score |= {"perplexity": [math.inf, None][n % 2], "standard_error": math.nan, "factor": None}
            score |= {"bits_per_byte": None, "against": {"kl": math.nan, "kl_standard_error": None, "agreement": None}}
    for cut in (report["cut"] or {}).get("cuts", [])[::3]:
        cut |= {"error": math.nan, "error_held_out": None, "error_without": math.inf}
        cut.pop("score_dropped")
    return report


def named(report: Report, name: str) -> Report:
    """The same with a name and texts that strangers chose."""
    report = copy.deepcopy(report)
    report["title"] = report["conditions"]["command"] = name
    for model in report["models"]:
        model["name"] = name
        model["prompts"], model["continuations"] = [name], [name]
        for record in (*model["perplexities"], *model["tasks"]):
            record["text" if "text" in record else "task"] = name
    for n, point in enumerate(report["points"]):
        point |= {"settings": f"{name}{n}", "series": f"{name}{n}", "note": name}
        for score in point["perplexities"]:
            score["text"] = name
    if report["cut"]:
        report["cut"] |= {"parent": name, "paper": name}
        report["cut"]["recipe"]["calibration"] = report["cut"]["calibration"]["source"] = name
    return report


def every() -> Iterator[tuple[str, Report]]:
    """All kinds of reports, sound, broken and with hostile names."""
    for name, made in examples.ALL.items():
        yield name, made()
        yield f"{name}, broken", broken(made())
        yield from ((f"{name}, {kind} names", named(made(), evil)) for kind, evil in EVIL.items())
    yield "uneven", examples.prune(uneven=True)
    for layers in (1, 200):
        report = examples.evaluate()
        yield f"{layers} layers", {**report, "cut": examples.cut(layers), "models": report["models"][1:]}


CASES = dict(every())


@pytest.mark.parametrize("report", CASES.values(), ids=CASES)
def test_a_page_is_well_formed_and_alone(report: Report) -> None:
    shown = page.render(report)
    shown.encode()
    parsed = Strict(shown)
    tags = [tag for tag, _ in parsed.tags]
    assert tags.count("h1") == 1 and tags[:2] == ["html", "head"] and "script" not in tags
    assert dict(parsed.tags)["html"] == {"lang": "en"} and ("meta", {"charset": "utf-8"}) in parsed.tags
    assert not re.search(r"@import|url\(", shown.partition("</style>")[0])
    for tag, attributes in parsed.tags:
        assert not {"src", "href", "srcset", "action"} & set(attributes), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert tag != "th" or attributes.get("scope") in ("row", "col", "rowgroup")
    assert tags.count("table") == tags.count("caption")
    for drawing in SVG.findall(shown):
        check_drawing(drawing)


def check_drawing(drawing: str) -> None:
    """A label in words, finite coordinates, all of them on the page."""
    root = ElementTree.fromstring(drawing)
    assert root.attrib["role"] == "img"
    (title, told), (_, _, width, height) = root[:2], map(float, root.attrib["viewBox"].split())
    assert title.tag.endswith("title") and title.text and told.tag.endswith("desc") and NUMBER.search(told.text or "")
    for element in root.iter():
        for name in ("d", "x", "y", "width", "height", "transform"):
            assert not re.search("nan|inf", element.attrib.get(name, "")), element.attrib
        if element.tag.endswith("text"):
            assert 0 <= float(element.attrib["x"]) <= width and 0 <= float(element.attrib["y"]) <= height


@pytest.mark.parametrize("made", examples.ALL.values(), ids=examples.ALL)
def test_every_number_of_the_tables_is_on_the_page(made: Any) -> None:
    report = made()
    text = Strict(page.render(json.loads(json.dumps(report)))).text()
    for row in tables.comparison_rows(report["models"]) if report["models"] else []:
        for cell in row:
            for part in cell.replace("(", " ").replace(")", " ").split():
                assert part in text, row
    for record in (*report["models"], *report["points"]):
        for score in record["perplexities"]:
            assert f"{score['perplexity']:,.2f}" in text or f"{score['perplexity']:,.0f}" in text
            assert f"{score['tokens']:,} tokens" in text and f"windows of {score['seq_len']}" in text
    for cut in (report["cut"] or {}).get("cuts", []):
        for key in ("error_without", "error", "error_held_out"):
            assert f"{cut[key]:.4f}" in text
    assert report["conditions"]["command"] in text and report["conditions"]["machine"] in text


def test_what_models_write_and_answer_is_on_the_page() -> None:
    report = examples.evaluate()
    text = Strict(page.render(report)).text()
    for model in report["models"]:
        assert all(" ".join(t.split()) in text for t in (*model["prompts"], *model["continuations"]))
        for speed in model["speeds"]:
            assert f"{speed['prefill']:,.0f}" in text and f"context {speed['context']}, batch {speed['batch']}" in text
        for task in model["tasks"]:
            assert f"{task['accuracy']:.1%}"[:-1] in text and f"chance {task['chance']:.1%}"[:-1] in text


def test_a_page_holds_nothing_of_a_stranger_but_text() -> None:
    for made in examples.ALL.values():
        parsed = Strict(page.render(named(made(), NASTY)))
        assert '<script>alert("1")</script>&<b>' in parsed.text()
        assert {tag for tag, _ in parsed.tags}.isdisjoint({"script", "b"}) or "figure" in {t for t, _ in parsed.tags}
        assert "\x00" not in parsed.text() and "script" not in {tag for tag, _ in parsed.tags}


def test_sections_without_data_are_absent() -> None:
    shown = {name: headings(page.render(made())) for name, made in examples.ALL.items()}
    assert shown["prune"] == ["What was cut", "Layer by layer", "Conditions"]
    assert shown["compare"] == ["Leaderboard", "Conditions"] and shown["sweep"] == [
        "What each size costs",
        "Conditions",
    ]
    assert "Healing" in shown["healed"] and "Healing" not in shown["evaluate"]
    assert headings(page.render({"title": "nothing", "kind": "evaluate"})) == []
    alone = {**examples.evaluate(), "cut": None, "models": [examples.model("demo")], "reference": None}
    assert headings(page.render(alone)) == ["Measured", "What they write", "Conditions"]


def test_the_headline_says_size_speed_and_loss_or_how_to_measure_them() -> None:
    def words(report: Report) -> str:
        return Strict(page.render(report).partition("</header>")[0] + "</header></body></html>").text()

    measured = words(examples.evaluate())
    for part in (
        "−16.0 %",
        "−20.3 % of the decoder",
        "×1.20",
        "×1.32",
        "28.34 ± 1.11 → 37.32 ± 1.46",
        "windows of 512",
    ):
        assert part in measured
    assert "billhook evaluate" not in measured
    assert "billhook evaluate OUT --against demo --report report.html" in words(examples.prune())
    assert "best at 20 %: fasp ×1.32" in words(examples.compare()) and "next: fasp:score=wanda" in words(
        examples.compare()
    )
    assert "27 %" in words(examples.sweep()) and "costs 1.2 % of perplexity" in words(examples.sweep())
    assert "not finite" in words(broken(examples.evaluate()))


def test_perplexities_over_other_tokens_are_not_compared() -> None:
    report = examples.evaluate()
    report["models"][1]["perplexities"][0]["tokens"] -= 512
    row = next(row for row in tables.measures(report["models"]) if row.name == "perplexity on news")
    assert row.change == "—" and row.conditions == "12,264 / 11,752 tokens, windows of 512"
    bits = next(row for row in tables.measures(report["models"]) if row.name == "bits a byte of news")
    assert bits.change == "×1.082"
    assert "tokens differ" in page.render(report)


def test_rows_of_the_comparison() -> None:
    first, last = examples.model("demo"), examples.model("small", 0.797, 1.317, 1)
    assert tables.comparison_header([first, last]) == ["", "demo", "small", "change"]
    rows = {row[0]: row[1:] for row in tables.comparison_rows([first, last])}
    assert rows["parameters"] == ["134.52 M", "112.96 M", "×0.840"]
    assert rows["perplexity on news (12,264 tokens, windows of 512)"] == ["28.34 ± 1.11", "37.32 ± 1.46", "×1.317"]
    assert rows["prefill tokens/s (context 512, batch 1, median of 5)"] == ["732 (717–747)", "878 (860–895)", "×1.199"]
    assert rows["boolean (500 questions, chance 50.0 %)"] == ["60.8 ± 2.2 %", "55.8 ± 2.2 %", "−5.0 points"]
    assert rows["KL from demo on news (nats a token)"] == ["", "0.374 ± 0.009", ""]
    assert all(len(row) == 2 for row in tables.comparison_rows([first]))
    bare = {"name": "bare", "sizes": {"parameters": 10, "decoder_parameters": 8}, "perplexities": []}
    assert tables.comparison_rows([bare]) == [["parameters", "10"], ["decoder parameters", "8"]]


def test_markdown_is_a_table_whatever_the_names() -> None:
    models = [examples.model("a|b\n<c>"), examples.model("`d`*")]
    lines = tables.markdown(models).splitlines()
    assert lines[0] == r"|  | a\|b &lt;c> | \`d\`\* | change |" and lines[1] == "|---|---:|---:|---:|"
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 5 for line in lines)
    assert len(lines) == 2 + len(tables.comparison_rows(models)) and tables.markdown([]) == ""


@pytest.mark.parametrize("width", [NARROW, WIDE])
@pytest.mark.parametrize(
    ("heights", "log"),
    [
        ([28.0], True),
        ([5.0, 5.0, 5.0], True),
        ([0.0, 0.0], False),
        ([28.0, math.inf, None, math.nan, 31.0], True),
        ([1e-300, 1e300], True),
        ([-1.0, 0.0, 3.0], True),
        ([1.0, 1.0000001], True),
    ],
)
def test_curves_of_extreme_numbers(heights: list[float | None], log: bool, width: int) -> None:
    points = [Point(n / 10, y, [None, math.inf, 1e9][n % 3]) for n, y in enumerate(heights)]
    lines = [Series(f"a long name of a method {n}" * n, points) for n in range(9)]
    drawing = charts.curves(
        "Curve",
        lines,
        Axis("x", percent=True),
        Axis("y", log=log),
        Series("dense", points[:1]),
        Band(0, 0, 0, "knee"),
        width,
    )
    check_drawing(drawing)
    assert charts.curves("Curve", [Series("a", [Point(0, None)])], Axis("x"), Axis("y")) == ""


@pytest.mark.parametrize("width", [NARROW, WIDE])
@pytest.mark.parametrize("row", [[0.5], [0.0] * 200, [None, math.inf, 1e9, math.nan], [1] * 30, list(range(200))])
def test_steps_of_extreme_numbers(row: list[float | None], width: int) -> None:
    check_drawing(charts.layers("Steps", {"one": row, "none": [None]}, Axis("y"), gone=[0], width=width))
    assert charts.layers("Steps", {"one": [None, math.nan]}, Axis("y")) == ""


def test_a_chart_says_its_numbers_in_words() -> None:
    shown = page.render(examples.sweep())
    told = html.unescape(re.findall("<desc>(.*?)</desc>", shown)[0])
    assert told.startswith("unpruned: 28.34 ± 1.11 at 0 %; fasp: 28.34 ± 1.11 at 0 %, 31.74 ± 1.243 at 10.3 %")
    shown = page.render(examples.prune())
    assert "restored: mean 0." in shown and "from 0.0" in shown


def test_series_differ_in_more_than_colour() -> None:
    lines = [Series(f"s{n}", [Point(0.1, n + 1.0), Point(0.2, n + 2.0)]) for n in range(42)]
    drawing = charts.curves("Many", lines, Axis("x"), Axis("y"))
    marks = re.findall(r'<g><title>s\d+: .*?d="(.*?)".*?style="fill:(.*?)"', drawing)
    assert len(set(marks)) == 42


def test_ticks_are_numbers_that_people_read() -> None:
    assert [written(t) for t in log_ticks(26, 60, 6)] == ["30", "40", "50", "60"]
    assert [written(t) for t in log_ticks(26, 3000, 6)] == ["50", "100", "200", "500", "1,000", "2,000"]
    assert [written(t) for t in linear_ticks(0, 0.42, 6)] == ["0", "0.1", "0.2", "0.3", "0.4"]
    assert [written(t) for t in (12000, 2e6, 1e9, 3e-7)] == ["12 k", "2 M", "10⁹", "3·10⁻⁷"]
    for low, high in ((1e-9, 1e9), (20, 20.001), (1, 1e300), (0.5, 7)):
        assert 0 < len(log_ticks(low, high, 5)) <= 5 and all(low <= t <= high for t in log_ticks(low, high, 5))
    assert fit([3.0], 0, 100).at(3.0) == pytest.approx(50) and fit([3.0], 0, 100, log=True).at(3.0) == pytest.approx(50)


MEASURE = """onload = () => {
  const rects = (nodes) => [...nodes].map((n) => n.getBoundingClientRect()).filter((r) => r.width)
  const out = [...document.querySelectorAll('iframe')].map((frame) => {
    const view = frame.contentWindow, doc = frame.contentDocument
    doc.querySelectorAll('details').forEach((d) => { d.open = true })
    const colour = (n, what) => view.getComputedStyle(n)[what]
    const drawn = [...doc.querySelectorAll('svg')].filter((s) => s.getBoundingClientRect().width)
    const letters = [], clashes = [], outside = []
    for (const svg of drawn) {
      const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width
      const texts = [...svg.querySelectorAll('text')]
      for (const [n, text] of texts.entries()) {
        const a = text.getBoundingClientRect()
        letters.push(parseFloat(colour(text, 'fontSize')) * scale)
        if (a.left < -0.5 || a.right > view.innerWidth + 0.5) outside.push(text.textContent)
        for (const other of texts.slice(n + 1)) {
          const b = other.getBoundingClientRect()
          if (a.left < b.right && b.left < a.right && a.top + 2 < b.bottom - 2 && b.top + 2 < a.bottom - 2)
            clashes.push(text.textContent + ' / ' + other.textContent)
        }
      }
    }
    const inks = ['body', '.soft', '.conditions', 'summary', 'th', 'small'].map((s) => doc.querySelector(s))
    return {
      name: frame.name, width: view.innerWidth, needs: doc.documentElement.scrollWidth, charts: drawn.length,
      all: doc.querySelectorAll('svg').length, smallest: Math.min(...letters), clashes, outside,
      page: colour(doc.body, 'backgroundColor'), inks: inks.filter(Boolean).map((n) => colour(n, 'color')),
      lines: [...doc.querySelectorAll('svg path:not(.halo)')].map((n) => colour(n, 'stroke')).filter((c) => c != 'none'),
    }
  })
  document.body.textContent = 'FOUND' + JSON.stringify(out) + 'DNUOF'
}"""
BROWSER = shutil.which("chromium")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --dump-dom"


def seen(pages: dict[str, str], folder: Path) -> list[dict[str, Any]]:
    """What Chromium makes of pages in frames 360 and 1200 wide, light and dark."""
    frames = [
        f'<iframe name="{html.escape(name)}, {width}, {scheme}" style="width:{width}px;height:900px;border:0;'
        f'color-scheme:{scheme}" srcdoc="{html.escape(shown)}"></iframe>'
        for name, shown in pages.items()
        for width in (360, 1200)
        for scheme in ("light", "dark")
    ]
    (folder / "frames.html").write_text(
        f"<!DOCTYPE html><meta charset=utf-8>{''.join(frames)}<script>{MEASURE}</script>"
    )
    command = [
        str(BROWSER),
        *FLAGS.split(),
        f"--user-data-dir={folder / 'profile'}",
        f"file://{folder / 'frames.html'}",
    ]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    return json.loads(html.unescape(shown.rpartition("FOUND")[2].partition("DNUOF")[0]))


def contrast(one: str, other: str) -> float:
    """The ratio of two colours' luminances, by the rule of WCAG."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        red, green, blue = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.skipif(BROWSER is None, reason="chromium is not installed (apt-get install chromium)")
def test_pages_in_a_browser(tmp_path: Path) -> None:
    pages = {name: page.render(report) for name, report in CASES.items() if "broken" not in name or "sweep" in name}
    found = seen(pages, tmp_path)
    assert len(found) == 4 * len(pages)
    for one in found:
        where = one["name"]
        assert one["needs"] <= one["width"] == (360 if ", 360," in where else 1200), where
        assert one["charts"] * 2 == one["all"], where  # either the narrow ones or the wide ones
        assert not one["charts"] or one["smallest"] >= 10, where
        assert one["clashes"] == [] and one["outside"] == [], where
        assert (contrast(one["page"], "rgb(0,0,0)") < 2) == where.endswith("dark"), where
        assert all(contrast(ink, one["page"]) >= 4.5 for ink in one["inks"]), (where, one["inks"])
        assert all(contrast(line, one["page"]) >= 4 for line in one["lines"]), where

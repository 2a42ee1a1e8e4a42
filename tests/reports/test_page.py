"""report.html: well-formed, escaped, self-contained, complete; and as Chromium shows it on a phone, wide, light and
dark."""

import copy
import html
import io
import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import example_reports as examples
import pytest
from rich.console import Console

from billhook.reports import card as card_module
from billhook.reports import charts, commands, page, recovery_tables, tables, terminal
from billhook.reports import records as reports
from billhook.reports.charts import NARROW, WIDE, Axis, Band, Point, Series
from billhook.reports.cut_tables import cut_rows
from billhook.reports.formatting import rate
from billhook.reports.scales import fit, linear_ticks, log_ticks, written
from billhook.reports.search_tables import outcome_words

VOID = {"meta", "br", "wbr", "hr", "img", "link", "input"}
SVG = re.compile(r"<svg .*?</svg>", re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
NASTY = '<script>alert("1")</script>&<b>\x00\ud800" onload="x'
EVIL = {"long": "a_very-long.name/" * 12, "script": NASTY}
LOG = Axis("y", log=True)
SEARCH = "How the samples and the metric were found"
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
    if healing := report["healing"]:
        for n, step in enumerate(healing["evaluations"][1:]):
            step["perplexities"] |= dict.fromkeys(step["perplexities"], [math.inf, None, math.nan][n % 3])
        healing |= {"tokens_per_second": math.nan, "losses": [*healing["losses"][:-2], math.nan, None]}
        healing["seconds"]["training"], healing["peak_growth_bytes"] = None, None
        for tried in healing["rates"][:1]:
            tried["loss"] = math.inf
        if known := healing["teacher_perplexities"]:
            known["news"] = math.nan
    lose_bits(report.get("quantized"))
    for one in ((report["cut"] or {}).get("selection") or {"candidates": []})["candidates"][:1]:
        one |= {"after": {"wiki_valid": math.inf, "news": None}, "rank_after": None}
    if search := (report["cut"] or {}).get("search"):
        lose(search)
    return report


def lose_bits(few: Report | None) -> None:
    """Every third weight of a quantised model has no errors, and some trials no loss."""
    for one in few["operators"][::3] if few else ():
        one |= {"error": math.nan, "error_held_out": None, "error_nearest": math.inf}
    if few:
        few["choice"] |= {"kl": math.nan, "uniform_kl": None}
        few["choice"]["tried"][1]["kl"] = few["choice"]["tried"][-1]["kl"] = math.nan


def lose(search: Report) -> None:
    """Every third number of a search's record is none."""
    search |= {"gain": math.nan, "standard_error": None}
    for key, numbers in (
        ("trials", ("worse", "proxy")),
        ("known", ("loss", "gain", "standard_error")),
        ("parts", ("loss", "gain", "standard_error")),
        ("finalists", ("rung", "final", "gain", "standard_error")),
    ):
        for n, one in enumerate(search[key][::3]):
            one |= dict.fromkeys(numbers, [None, math.nan, math.inf][n % 3])
    search["importance"] |= {"windows": math.nan, "draw": None}
    search["pool"]["shares"][::3] = [None] * len(search["pool"]["shares"][::3])
    own, shape = search["winner"]["solution"], search["winner"]["shape"]
    own |= {"power": math.nan, "coefficients": {"energy": None}}
    shape |= {"slope": None, "bend": math.nan}


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
    if healing := report["healing"]:
        rename(healing, name)
    rename_bits(report.get("quantized"), name)
    if selection := (report["cut"] or {}).get("selection"):
        selection |= {"by": f"{name}wiki_valid", "chosen": name}
        for n, one in enumerate(selection["candidates"]):
            one |= {key: {f"{name}{text}": value for text, value in one[key].items()} for key in ("before", "after")}
            one["name"] = f"{name}{n or ''}"
    if search := (report["cut"] or {}).get("search"):
        rename_search(search, name)
    return report


def rename_bits(few: Report | None, name: str) -> None:
    """Every name in a quantised model's record becomes one that a stranger chose."""
    for n, one in enumerate(few["operators"] if few else ()):
        one["path"] = f"{name}{n}"
    if few:
        few["parent"] = name


def rename_search(search: Report, name: str) -> None:
    """Every name and text in a search's record becomes one that a stranger chose."""
    search |= {"sampler": name, "judges": [name]}
    search["importance"] = {f"{name}{dimension}": share for dimension, share in search["importance"].items()}
    search["pool"]["sources"] = [name for _ in search["pool"]["sources"]]
    search["pool"]["samples"] = [name for _ in search["pool"]["samples"]]
    search["winner"]["solution"] |= {"reduction": name, "coefficients": {name: 0.5, f"{name}2": 0.5}}
    for one in search["known"]:
        one |= {"metric": f"{name}{one['metric']}", "meaning": name}
    for one in search["parts"]:
        one["what"] = f"{name}{one['what']}"


def rename(healing: Report, name: str) -> None:
    """Every name in a recovery's record becomes one that a stranger chose."""
    healing |= {"student": name, "teacher": healing["teacher"] and name, "texts": [name], "text_sha256": [name]}
    healing["stopped"] = healing["stopped"] and f"{name} got worse"
    for key in ("judged_by", "teacher_perplexities"):
        healing[key] = healing[key] and {f"{name}{text}": value for text, value in healing[key].items()}
    for step in healing["evaluations"]:
        step["perplexities"] = {f"{name}{text}": value for text, value in step["perplexities"].items()}


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


def test_every_weight_of_a_quantised_model_is_on_the_page() -> None:
    report = examples.quantize()
    shown = page.render(report)
    text = Strict(shown).text()
    for one in report["quantized"]["operators"]:
        assert one["path"] in text and f"{one['error']:.4f}" in text and one["grid"] in text
    assert "117,512,345" in text and "best of 4 trials 0.1200" in text and "0.14220" in text
    assert "layer by layer" in "".join(SVG.findall(shown))
    assert "billhook evaluate OUT --against OUT --report report.html" in text


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
    assert shown["recover"] == ["Healing", "Judged after a short heal", "What was cut", "Conditions"]
    assert shown["quantize"] == ["Fewer bits", "Conditions"]
    assert shown["pretrained"] == ["Healing", "Conditions"]
    assert shown["search"] == [SEARCH, "What was cut", "Layer by layer", "Conditions"]
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
    for part in (
        "perplexity on wiki_valid 54.27 before: 210.73; ×2.44 of demo's 22.27; 4,088 tokens, windows of 512",
        "tokens of training 122,880 kept of 245,760 tokens of wiki_train, 0.629 passes over it; distillation from demo",
        "all parameters (123.90 M)",
        "training tokens/s 412 7 min in bfloat16; 1,812 MiB beyond the loaded model",
        "Only perplexity has been measured.",
        "billhook evaluate OUT2 --against demo --report report.html",
    ):
        assert part in words(examples.recover()), part
    lost = words(broken(examples.recover()))
    assert "perplexity on wiki_valid — not finite; before: 210.73; demo's 22.27; 4,088 tokens" in lost
    alone = words(examples.pretrained())
    assert "60.19 before: 210.73; 4,088 tokens" in alone and "billhook evaluate" not in alone
    assert "92,160 of wiki_train and letters, 1.31 passes over them; continued pretraining" in alone
    assert "the head and the last three layers (38.98 M of 123.90 M, 31.5 %)" in alone


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
    check_drawing(charts.layers("Steps", {"one": row, "none": [None]}, Axis("y"), dropped=[0], width=width))
    assert charts.layers("Steps", {"one": [None, math.nan]}, Axis("y")) == ""


def test_a_chart_says_its_numbers_in_words() -> None:
    shown = page.render(examples.sweep())
    told = html.unescape(re.findall("<desc>(.*?)</desc>", shown)[0])
    assert told.startswith("unpruned: 28.34 ± 1.11 at 0 %; fasp: 28.34 ± 1.11 at 0 %, 31.74 ± 1.243 at 10.3 %")
    shown = page.render(examples.prune())
    assert "restored: mean 0." in shown and "from 0.0" in shown


def section(report: Report, title: str) -> str:
    shown = page.render(report)
    return Strict(
        f"<section><h2>{title}{shown.partition(f'<h2>{title}')[2].partition('</section>')[0]}</section>"
    ).text()


def table_rows(report: Report, caption: str) -> list[tuple[bool, list[str]]]:
    """The rows of a table, each with whether it is bold."""
    body = page.render(report).partition(f"<caption><span>{caption}")[2].partition("</table>")[0]
    rows = re.findall("<tr( class=.best.)?>(.*?)</tr>", body)
    return [(bool(best), re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row.replace("\u00a0", " "))) for best, row in rows]


def test_healing_says_how_the_training_went() -> None:
    report = examples.recover()
    words, healing = section(report, "Healing"), report["healing"]
    for part in (
        "Stopped early: news got worse after 184,320 tokens: the model of 122,880 tokens is kept.",
        "Distillation from demo with hidden states and embeddings; the teacher's 256 likeliest tokens;",
        "122,880 of 245,760 tokens of wiki_train (0.629 passes over it)",
        "180 of 240 steps of 1,024 tokens, windows of 512, rate 6e-4, warmed up over 5 % of them, in bfloat16: 412 tokens/s",
        "news: 12,264 tokens, windows of 512;",
        "level dotted lines: demo, wiki_valid 22.27, news 27.18; shaded: training after the model that was kept",
        "kept at 122,880",
        "each point is the mean of 3 steps",
    ):
        assert part in words, part
    rows = table_rows(report, "Perplexity after so many tokens")
    assert rows[0][1] == ["tokens", "wiki_valid", "news", "wiki_train, held out"]
    assert [row[0] for best, row in rows if best] == ["122,880"]
    for row, step in zip(rows[1:], healing["evaluations"], strict=False):
        assert row[1][0] == f"{step['tokens']:,}"
        for text, shown in zip(rows[0][1][1:], row[1][1:], strict=True):
            assert shown.startswith(f"{step['perplexities'][text]:,.2f}") and ("(×" in shown) == (
                "held out" not in text
            )
    assert rows[-1] == (False, ["teacher", "22.27", "27.18", "—"]) and len(rows) == 2 + len(healing["evaluations"])
    tried = table_rows(report, "Loss on held-out windows of the training text")
    assert tried[1:] == [(False, ["3e-4", "1.912"]), (True, ["6e-4", "1.794"]), (False, ["1.2e-3", "1.846"])]
    conditions = section(report, "Conditions")
    assert f"480 of 763 windows of 512 tokens of wiki_train, seed 0, sha256 {'9c21' * 16}" in conditions
    assert "teacher 99.1, rates 42.0, training 447.2, judging 70.2" in conditions and "exp of the mean" in conditions


def test_the_teacher_and_what_was_in_vain_are_drawn() -> None:
    shown = page.render(examples.recover())
    drawing = next(one for one in SVG.findall(shown) if "Perplexity on held-out text" in one)
    assert drawing.count('class="dense"') == 2 and drawing.count("<rect") == 1  # one a text that the teacher was asked
    told = html.unescape(re.findall("<desc>(.*?)</desc>", drawing)[0])
    assert told.startswith("wiki_valid: 210.7 at 0, 99.81 at 30,720,") and "51.08 at 184,320, dotted at 22.27;" in told
    assert reports.assemble("recover", "", {}, healing={"steps": 1}).keys() == examples.recover().keys()
    level = charts.curves("Levels", [Series("a", [Point(0, 5.0)], y) for y in (math.nan, None, -1.0)], Axis("x"), LOG)
    assert "dense" not in level and "dotted" not in level
    far = charts.curves("Level", [Series("a", [Point(0, 5.0)], 500.0)], Axis("x"), LOG)
    check_drawing(far)
    assert ">500<" in far


def test_healing_without_a_teacher_or_an_early_end_says_nothing_of_them() -> None:
    report = examples.pretrained()
    words = section(report, "Healing")
    for part in ("Stopped", "teacher", "dotted", "shaded", "kept at", "Rates tried", "mean of", "likeliest"):
        assert part not in words, part
    assert "Continued pretraining; trained: the head and the last three layers" in words and "at every step" in words
    assert "training loss: 3.29 at 2,048," in page.render(report)
    report["healing"]["batch_tokens"] = 2100  # asked for: a step has whole windows
    shown = page.render(report)
    assert "training loss: 3.29 at 2,048," in shown and "45 steps of 2,048 tokens" in shown
    assert "45 steps of 2,048 tokens" in words and "in float32, 2 processes: 412 tokens/s." in words
    report["healing"]["kept_tokens"] = 61_440
    assert "The model of 61,440 tokens is kept." in section(report, "Healing")
    report["healing"] |= {"evaluations": [], "losses": [], "judged_by": {}}
    shown = page.render(report)
    assert "<svg" not in shown and "All perplexities" not in shown and headings(shown) == ["Healing", "Conditions"]


def test_the_loss_of_thousands_of_steps_is_some_means_that_say_so() -> None:
    report = examples.recover()
    report["healing"] |= {"losses": [2.0] * 3000 + [math.nan, None] + [1.0] * 2998, "steps": 6000}
    shown = page.render(report)
    assert "each point is the mean of 100 steps; 2 of 6,000 steps have no finite loss" in section(report, "Healing")
    told = next(told for told in re.findall("<desc>(.*?)</desc>", shown) if told.startswith("training loss"))
    assert told.count(" at ") == 60 and told.startswith("training loss: 2 at 51,712, 2 at 154,112")


def test_candidates_are_shown_by_their_rank_after_the_heal() -> None:
    rows = table_rows(examples.recover(), "Perplexity and rank before → after 10,240 tokens of training")
    assert rows[0][1] == ["candidate", "layers dropped", "wiki_valid", "news", "rank"]
    assert rows[1] == (True, ["contiguous", "11-13", "210.73 → 54.31", "307.02 → 80.64", "2 → 1"])
    assert rows[2] == (False, ["greedy", "5, 13, 20", "188.40 → 61.70", "290.12 → 91.30", "1 → 2"])
    words = section(examples.recover(), "Judged after a short heal")
    assert "trained for 10,240 tokens; wiki_valid decided. 300 s for all of them." in words
    lost = table_rows(broken(examples.recover()), "Perplexity and rank")[-1]
    assert lost == (False, ["greedy", "5, 13, 20", "188.40 → —", "290.12 → —", "1 → —"])


def parts(report: Report) -> list[str]:
    """The headings inside the section about the search."""
    return re.findall("<h3>(.*?)</h3>", page.render(report).partition(SEARCH)[2].partition("</section>")[0])


def test_a_search_says_what_it_found_and_how() -> None:
    report = examples.search()
    words, found = section(report, SEARCH), report["cut"]["search"]
    for part in (
        "64 trials by tpe (8 repeated, 36 tried, 18 dropped, 2 failed): number 44 beats the best fixed metric, energy on the "
        "whole pool, by 0.0167 ± 0.0044 nats a token (1.66 % of perplexity) on windows that no trial saw.",
        "A pool of 64 windows of 128 tokens of wiki_train and <script>letters, sorted into 4 clusters; 99 more left out,",
        "Judged on wiki_valid: 32 windows of 128 tokens for the proxy, 77 windows of 128 tokens in turn for trials, "
        "16 windows of 512 tokens to decide in the end.",
        "dotted at 0: energy on the whole pool;",
        "star: number 44, the best of the finalists on more windows; arrows: 1 off the scale, up to 1.83; "
        "not drawn: 18 dropped untried by the proxy, 8 repeated what was known, 2 failed",
    ):
        assert part in words, part
    assert outcome_words(found) in words
    assert parts(report) == [
        *("What decided", "Where the gain comes from", "Known metrics on the whole pool", "Finalists"),
        "What was chosen",
    ]
    shares = table_rows(report, "Share of the losses' variance".replace("'", "&#x27;"))
    assert shares[1] == (False, ["how many windows", "19.0 %"]) and shares[2][1][1] == "18.1 %"
    assert len(shares) == 12 and shares[-1][1] == ["4 others together", "3.5 %"]
    steps = table_rows(report, "Nats a token on the windows that decided, without restoration up to the last row")
    assert steps[1:3] == [
        (False, ["the best fixed metric on the whole pool", "5.5840", ""]),
        (False, ["its samples changed", "5.5809", "+0.0031 ± 0.0059"]),
    ]
    known = table_rows(report, "Nats a token, tried before the first trial")
    assert [row[1] for best, row in known if best] == ["5.5814"] and len(known) == 9
    assert known[7][1][1:] == ["5.8021", "−0.2207 ± 0.0046"] and "squared output error" in known[8][1][0]
    last = table_rows(report, "Nats a token, restored as the result is")
    assert [row[1:] for row in last[1:]] == [
        (["energy", "5.5951", "5.6050", ""],),
        (["obs (FASP)", "5.5973", "5.6071", "−0.0021 ± 0.0044"],),
        (["number 17", "5.5907", "5.5997", "+0.0053 ± 0.0044"],),
        (["number 44", "5.5812", "5.5883", "+0.0167 ± 0.0044"],),
        (["number 26", "5.5898", "5.6068", "−0.0018 ± 0.0044"],),
    ]
    assert [row[0] for best, row in last if best] == ["number 44"]


def test_what_a_search_chose_is_on_the_page_and_in_a_row() -> None:
    report = examples.search()
    assert [row for _, row in table_rows(report, "The solution of number 44")] == [
        ["clusters", "cluster 1 ×2; clusters 0, 3 ×1; cluster 2 left out"],
        ["windows", "31 of 64 windows of the pool, draw 3"],
        ["metric", "0.9 energy + 0.7 gate_fisher + 0.2 param_mix"],
        ["power of each term", "0.5"],
        ["over a unit&#x27;s slots", "max"],
        ["terms are scaled", "over the whole model"],
        ["layers spared", "3 at the start, 0 at the end"],
        ["slope over depth", "+0.7 (above 0 the last layers give more than the first)"],
        ["bend over depth", "−0.2 (above 0 both ends give more than the middle)"],
    ]
    assert dict(cut_rows(report["cut"]))["samples and metric"] == (
        "31 of 64 windows of the pool, draw 3 (cluster 1 ×2; clusters 0, 3 ×1; cluster 2 left out); 0.9 energy + 0.7 gate_fisher "
        "+ 0.2 param_mix, power 0.5, max over slots, scaled over the model; 3 + 0 layers spared, slope +0.7, bend −0.2"
    )
    assert "samples and metric" not in dict(cut_rows(examples.cut()))


def test_the_samples_of_a_search_are_shown_by_what_they_weigh() -> None:
    report = examples.search()
    pool = report["cut"]["search"]["pool"]
    shown = page.render(report).partition("The samples, as text")[2].partition("</details>")[0].replace("\u00a0", " ")
    texts = [html.unescape(text) for text in re.findall('<blockquote dir="auto">(.*?)</blockquote>', shown)]
    used = sorted((n for n, share in enumerate(pool["shares"]) if share), key=lambda n: (-pool["shares"][n], n))
    assert texts == [pool["samples"][n] for n in used] and len(texts) == 31
    assert "<h4>&lt;script&gt;letters, cluster 3, 2.3 %</h4><blockquote" in shown and "heaviest" not in shown
    pool |= {key: pool[key] * 2 for key in ("source", "clusters", "samples")} | {"shares": [1 / 128] * 128}
    shown = page.render(report).partition("The samples, as text")[2].partition("</details>")[0]
    assert shown.count("<blockquote") == 64 and "The 64 heaviest of 128 windows." in shown


def test_the_trace_of_a_search_draws_what_was_tried() -> None:
    drawing = next(one for one in SVG.findall(page.render(examples.search())) if "Trace of the search" in one)
    assert drawing.count("<g><title>tried: ") == 36 and drawing.count("<g><title>best so far") == 0
    told = html.unescape(re.findall("<desc>(.*?)</desc>", drawing)[0]).split("; ")
    assert [one.partition(":")[0] for one in told] == ["number 44", "tried", "best so far"]
    assert told[1].startswith("tried: 0.01995 at 8, ") and told[1].endswith(", dotted at 0") and "1.83 at 12" in told[1]
    heights = [float(one.split(" at ")[0]) for one in told[2].removeprefix("best so far: ").split(", ")]
    assert heights == sorted(heights, reverse=True) and len(heights) == 36


def test_a_search_that_found_nothing_better_says_so() -> None:
    report = examples.search()
    found = report["cut"]["search"]
    found |= {"accepted": False, "gain": -0.0018, "standard_error": 0.0044, "restoration": False, "objective": "kl"}
    found["winner"] = {"solution": found["trials"][7]["solution"], "shape": None}
    words = section(report, SEARCH)
    for part in (
        "the best, number 44, gains −0.0018 ± 0.0044 nats a token on windows that no trial saw, no more than its standard error: "
        "energy on the whole pool is taken.",
        "Objective of the trials: kl.",
    ):
        assert part in words, part
    assert "of perplexity" not in words and "layers spared" not in words
    chosen = dict(row for _, row in table_rows(report, "The solution of energy"))
    assert (chosen["clusters"], chosen["metric"]) == ("all alike", "energy alone")
    last = table_rows(report, "Nats a token, without restoration")
    assert [row[0] for best, row in last if best] == ["energy"]
    assert dict(cut_rows(report["cut"]))["samples and metric"].endswith(
        "energy alone, power 1, sum over slots, scaled in each layer; the best fixed metric: no trial was better beyond its "
        "standard error"
    )
    found |= {"chosen": None, "gain": 0.0, "standard_error": 0.0}
    words = section(report, SEARCH)
    assert (
        "2 failed): none differs from what was known, and the best of that, energy on the whole pool, is taken."
        in words
        and "star:" not in words
    )


def test_a_search_says_its_odds_and_where_windows_were_seen_again() -> None:
    report = examples.search()
    found = report["cut"]["search"]
    found |= {"needed": 2.18, "odds": 0.02275, "rung_windows": 200}
    words = section(report, SEARCH)
    assert "on windows that no trial saw; one that is no better would pass one time in 44." in words
    assert "they took 200 windows in turn, and began again after 77." in words
    found |= {"accepted": False, "rung_windows": 77}
    words = section(report, SEARCH)
    assert (
        "no more than 2.2 standard errors: energy on the whole pool is taken." in words and "began again" not in words
    )


def test_a_search_without_numbers_leaves_out_what_has_none() -> None:
    report = examples.search()
    found = report["cut"]["search"]
    found |= {"trials": [], "known": [], "importance": {}, "parts": [], "finalists": [], "winner": {}, "pool": {}}
    found |= {"chosen": None, "accepted": False, "validation": {}}
    assert parts(report) == [] and "Trace" not in section(report, SEARCH)
    assert "0 trials by tpe: none differs from what was known" in section(report, SEARCH)
    assert SEARCH not in page.render({**report, "cut": {**report["cut"], "search": None}})
    assert SEARCH not in page.render(examples.prune())
    lost = broken(examples.search())
    words, chosen = section(lost, SEARCH), dict(row for _, row in table_rows(lost, "The solution of number 44"))
    assert "number 44 beats the best fixed metric, energy on the whole pool, by — nats a token on windows" in words
    assert chosen["power of each term"] == chosen["metric"] == "—" and chosen["bend over depth"].startswith("— (")
    assert not re.search(r"\b(nan|inf|None)\b", words)


def test_points_and_steps_are_drawn_as_such() -> None:
    places = [Point(n, y) for n, y in enumerate((3.0, 1.0, 2.0))]
    drawings = {
        kind: charts.curves("Kinds", [Series("a", places, drawn=kind)], Axis("x", whole=True), Axis("y"))
        for kind in ("line", "points", "steps")
    }
    for drawing in drawings.values():
        check_drawing(drawing)
    path = {kind: re.findall('<path d="(M[^"]*)" fill="none"', drawing) for kind, drawing in drawings.items()}
    assert re.fullmatch(r"M[\d. ]+L[\d. ]+L[\d. ]+", path["line"][0]) and path["points"] == []
    assert re.fullmatch(r"M[\d. ]+H[\d.]+V[\d.]+H[\d.]+V[\d.]+", path["steps"][0])
    assert [drawing.count("<g><title>") for drawing in drawings.values()] == [3, 3, 0]
    assert ">0.5<" not in drawings["line"] and ">1<" in drawings["line"]


def test_rows_of_a_recovery() -> None:
    found = examples.recover()["cut"]
    rows = dict(cut_rows(found))
    assert rows["recovered"] == (
        "distillation from demo with hidden states and embeddings, 122,880 of 245,760 tokens of wiki_train at 6e-4, "
        "all parameters"
    )
    assert rows["perplexity on news"] == "307.02 → 88.91; ×3.27 of demo's 27.18; 12,264 tokens, windows of 512"
    assert rows["stopped early"].startswith("news got worse")
    assert rows["training"] == "658 s in all, 412 tokens/s in bfloat16, 1,812 MiB beyond the loaded model"
    assert rows["layers chosen"] == (
        "contiguous, of 4 candidates, by perplexity on wiki_valid after 10,240 tokens of training each"
    )
    later = examples.pretrained()["healing"]
    names = [name for name, _ in cut_rows({"recovery": [found["recovery"][0], later]})]
    assert [name for name in names if "recovered" in name] == ["recovered, 1 of 2", "recovered, 2 of 2"]
    assert "parameters" not in names and "recovered" not in dict(cut_rows(examples.cut()))
    assert [rate(r) for r in (6e-4, 3.5e-4, 1e-5, 0.1, 1.0, math.nan)] == ["6e-4", "3.5e-4", "1e-5", "0.1", "1", "—"]
    assert recovery_tables.dropped_after(later) is None
    assert "tokens learned on" not in rows
    learned = dict(cut_rows({"l0": None, "gates": {"tokens": 65_536}, "recovery": [found["recovery"][0]]}))
    assert learned["tokens learned on"] == "65,536 before the cut, 184,320 after it: 249,856 in all"


def test_a_model_card_says_what_was_trained_and_how_to_do_it_again() -> None:
    found = examples.recover()["cut"]
    card = card_module.model_card(found)
    assert "# demo, pruned and recovered by billhook" in card and "without training" not in card
    assert "pruned by layerchop (arXiv:2501.09412), then trained by distillation from demo" in card
    assert "tags: [billhook, pruned, layerchop, recovered]" in card
    assert f"Made by `{found['command']}`, then `{commands.recover_command(found['recovery'][0])}` (python" in card
    assert commands.recover_command(found["recovery"][0]) == (
        "billhook recover OUT --teacher demo --objective distill --states on --trainable all --tokens 245760 "
        "--text wiki_train --seq-len 512 --batch-tokens 1024 --lr 0.0006 --warmup 0.05 --top-k 256 "
        "--precision bfloat16 --seed 0 -o OUT2"
    )
    later = examples.pretrained()["healing"]
    twice = card_module.model_card({**found, "recovery": [*found["recovery"], later]})
    assert "-o OUT2`, then `accelerate launch --num_processes 2 -m billhook recover OUT2 --objective ce" in twice
    assert "--text wiki_train --text letters" in twice and "-o OUT3`" in twice
    untrained = card_module.model_card({**examples.cut(), "model_type": "llama"})
    assert "pruned without training by fasp" in untrained and "# demo, pruned by billhook" in untrained


def test_a_model_card_of_a_model_that_was_not_cut() -> None:
    record = {"recovery": [examples.pretrained()["healing"]], "versions": examples.VERSIONS}
    card = card_module.model_card(record)
    assert "# smaller, recovered by billhook" in card and "tags: [billhook, recovered]" in card
    assert "A `transformers` checkpoint, trained by continued pretraining, 92,160 tokens of wiki_train" in card
    assert "pruned" not in card and "recover smaller --objective ce" in card and "-o OUT`" in card
    assert "A `llama` checkpoint" in card_module.model_card({**record, "model_type": "llama"})
    rename(record["recovery"][0], "a|b\n<i>")
    told = card_module.model_card(record).partition("Made by")[0]
    rows = [line for line in told.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(cut_rows(record)) and "<i>" not in told
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)


def test_a_summary_shows_brackets_in_names() -> None:
    found = examples.recover()["cut"]
    found["recovery"][0]["texts"] = ["a[/b].txt"]
    console = Console(width=200, file=io.StringIO())
    with console.capture() as told:
        console.print(terminal.summary_table(found, "summary"))
    assert "tokens of a[/b].txt at 6e-4" in told.get()


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
@pytest.mark.parametrize(
    "kinds", [(*examples.ALL, "sweep, broken", "uneven", "200 layers"), pytest.param(CASES, marks=pytest.mark.whole)]
)
def test_pages_in_a_browser(kinds: Iterable[str], tmp_path: Path) -> None:
    """Some pages of each kind, or all; those of the longest names among them."""
    sound = (name for name in kinds if "broken" not in name or "sweep" in name)
    pages = {name: page.render(CASES[name]) for name in sound}
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

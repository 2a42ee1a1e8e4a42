"""What billhook does on an accelerator, beside its floor and a bare loop: bash benchmarks/gpu/run.sh [--tiny]

Rates of the card are measured first; then each row, until the minutes are over; the table is printed last, and its rows
are kept in OUT/gpu.csv, so that the same command goes on with the rows that are missing.  A floor is the least time
that the counted operations and bytes take at the measured rates (floors.py); the bare loop is in the row's own code
(rows.py): transformers' forward passes, a paper's loop, or the dense model.  `--tiny` runs all of it in miniature.
`--floors CARD` prints what can be counted, by a data sheet, and measures nothing.
"""

import argparse
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import floors
import results
import rows
import shapes
from rows import Bench, Line

from billhook.checkpoints.load import resolve_device

MINUTES = 8.5
STARTED = time.monotonic()
GIB = 2**30
HEAD = "| | seconds | floor | x floor | bare loop | x bare | peak beyond the model, GiB | |\n|---|---|---|---|---|---|---|---|"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tiny", action="store_true", help="tiny models, for a CPU")
    made.add_argument("--device", default="auto")
    made.add_argument("--rows", default=";".join(rows.ROWS), help="with semicolons (default: %(default)s)")
    made.add_argument(
        "--minutes", type=float, default=MINUTES, help="no row begins after so many (default: %(default)s)"
    )
    made.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT", "build/gpu")), help="where gpu.csv is kept"
    )
    made.add_argument("--floors", choices=floors.DATASHEETS, help="print floors by a data sheet")
    return made


def table_row(what: str, kept: dict[str, str]) -> str:
    """A line of the Markdown table, from a row of gpu.csv."""
    seconds = float(kept["seconds"])

    def beside(name: str) -> list[str]:
        return [figure(float(kept[name])), f"{seconds / float(kept[name]):.2f}"] if kept[name] else ["", ""]

    peak = f"{float(kept['peak_gib']):.2f}" if kept["peak_gib"] else ""
    return "| " + " | ".join([what, figure(seconds), *beside("floor"), *beside("bare"), peak, kept["said"]]) + " |"


def figure(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds >= 1 else f"{seconds:.3g}"


def print_floors(name: str) -> None:
    """What each line takes at least, by counting alone."""
    card = floors.DATASHEETS[name]
    print(
        f"{said(card)}\n\n| | bf16, Tops | float32 | float64 | moved, GB | floor, seconds |\n|---|---|---|---|---|---|"
    )
    for what, work in rows.counted(shapes.FULL).items():
        counts = (work.bf16 / 1e12, work.float32 / 1e12, work.float64 / 1e12, work.moved / 1e9)
        print("| " + " | ".join([what, *(f"{one:,.4g}" for one in counts), figure(work.seconds(card))]) + " |")


def said(card: floors.Card) -> str:
    rates = (card.bf16 / 1e12, card.float32 / 1e12, card.float64 / 1e12, card.bandwidth / 1e12)
    return "{}: bf16 {:.3g} Tops/s, float32 {:.3g}, float64 {:.3g}, {:.3g} TB/s".format(card.name, *rates)


def measure(bench: Bench, name: str, keys: dict[str, object], out: Path) -> bool:
    """One row, kept line by line; whether it ran to its end."""
    try:
        for line in rows.ROWS[name](bench):
            results.write("gpu", [{**keys, "row": name, "what": line.what, **numbers(line)}], out)
            print(
                f"{time.monotonic() - STARTED:5.0f} s  {line.what}: {figure(line.seconds)} s  {line.said}", flush=True
            )
        return True
    except Exception:  # the rows after it have their own numbers
        traceback.print_exc()
        return False
    finally:
        rows.free(bench.device)


def numbers(line: Line) -> dict[str, object]:
    peak = None if line.peak is None else line.peak / GIB
    return {"seconds": line.seconds, "floor": line.floor, "bare": line.bare, "peak_gib": peak, "said": line.said}


def main(given: list[str] | None = None) -> int:
    asked = parser().parse_args(given)
    if asked.floors:
        print_floors(asked.floors)
        return 0
    sizes, device = shapes.TINY if asked.tiny else shapes.FULL, resolve_device(asked.device)
    wanted = [name.strip() for name in asked.rows.split(";")]
    if unknown := [name for name in wanted if name not in rows.ROWS]:
        parser().error(f"--rows {unknown[0]}: choose from {', '.join(rows.ROWS)}")
    out = asked.out.absolute()
    card = floors.measured(device, sizes.product, sizes.copied)
    print(f"{said(card)}; {results.versions()}", flush=True)
    keys: dict[str, object] = {"card": card.name, "size": "tiny" if asked.tiny else "full"}
    done = {row["row"] for row in kept(out, keys)}
    missing, failed, late = [name for name in wanted if name not in done], [], []
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(device, card, sizes, Path(scratch))
        if missing:
            rows.warm_up(bench)
        for name in missing:
            if time.monotonic() - STARTED > 60 * asked.minutes:
                late.append(name)
            elif not measure(bench, name, keys, out):
                failed.append(name)
    print(f"\n{said(card)}\n\n{HEAD}")
    for row in kept(out, keys):
        print(table_row(row["what"], row))
    print(f"\nllm-compressor is no peer here: it cannot be carried.  {time.monotonic() - STARTED:.0f} s in all.")
    for why, names in (("failed", failed), ("no time was left; the same command goes on", late)):
        if names:
            print(f"{why}: {', '.join(names)}")
    return 1 if failed else 0


def kept(out: Path, keys: dict[str, object]) -> list[dict[str, str]]:
    """The lines of this card that are there."""
    return [row for row in results.read("gpu", out) if all(row[key] == value for key, value in keys.items())]


if __name__ == "__main__":
    sys.exit(main())

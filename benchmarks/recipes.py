"""Does every recipe still give its numbers?  python benchmarks/recipes.py [RECIPE...] [--texts FOLDER]

Runs `billhook run RECIPE -o OUT --check` for each of recipes/*.yaml, one after the other, OUT in a temporary folder,
and prints what was expected and what was measured; the exit code is 1 where one was not within its tolerance.  Recipes
that calibrate on a text are run in FOLDER, where it lies, and are left out without it.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import results

from billhook.pruning.recipe import RecipeFile, read_recipe


def measured(printed: str) -> dict[str, float]:
    """The numbers in the last table of `billhook run --check`: name, expected, measured."""
    rows = re.findall(r"│ (\S.*?) +│ +\S+ +│ +([\d.,]+) +│", printed)
    return {name: float(number.replace(",", "")) for name, number in rows}


def run(recipe: Path, texts: Path, out: Path) -> tuple[dict[str, float], str]:
    """What was measured, and how it ended: nothing where all is as expected."""
    command = [sys.executable, "-m", "billhook", "run", str(recipe), "-o", str(out), "--check"]
    width = {**os.environ, "COLUMNS": "200"}  # no cell of the table is cut
    done = subprocess.run(command, capture_output=True, text=True, cwd=texts, env=width)
    return measured(done.stdout), done.stderr.strip().splitlines()[-1] if done.returncode else ""


def lacks(file: RecipeFile, texts: Path) -> str:
    """A text that the recipe calibrates on and that is not there."""
    text = file.recipe.calibration
    return text if Path(text).suffix and not (texts / text).exists() else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", type=Path, default=sorted((results.ROOT / "recipes").glob("*.yaml")))
    parser.add_argument("--texts", type=Path, help="where wiki_train.txt lies")
    args = parser.parse_args()
    print("| recipe | number | expected | measured | within |\n|---|---|---|---|---|")
    ended = []
    with tempfile.TemporaryDirectory() as scratch:
        for recipe in args.recipes:
            file, texts = read_recipe(recipe), (args.texts or Path(scratch)).resolve()
            if text := lacks(file, texts):
                print(f"| {recipe.stem} | left out: {text} is not in --texts | | | |", flush=True)
                continue
            found, end = run(recipe.resolve(), texts, Path(scratch) / recipe.stem)
            tolerance = file.expect.get("tolerance", 0.0)
            for name, expected in file.expect.get("numbers", {}).items():
                number = found.get(name)
                within = number is not None and abs(number - expected) <= tolerance * expected
                seen = "nothing" if number is None else f"{number:,}"
                print(f"| {recipe.stem} | {name} | {expected:,} | {seen} | {'yes' if within else 'NO'} |", flush=True)
                row = {"recipe": recipe.stem, "number": name, "expected": expected, "measured": number}
                results.write("recipes", [row | {"within": within}])
            ended += [f"{recipe.stem}: {end}"] if end else []
    if ended:
        sys.exit("\n".join(ended))


if __name__ == "__main__":
    main()

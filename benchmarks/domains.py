"""Texts of four kinds to train on and to judge by: python benchmarks/domains.py FOLDER TRAIN VALID

Writes wiki, news, manual and code, each as NAME_train.txt and NAME_valid.txt: the beginnings of TRAIN and VALID; the
demo's articles; Python's language reference; its standard library.  They are of unequal length, as texts at hand are.
"""

import argparse
import sysconfig
from pathlib import Path

from billhook import demo

LENGTHS = {"wiki": 600_000, "news": 200_000, "manual": 120_000, "code": 80_000}  # characters to train on
VALID = 60_000  # characters to judge by

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", type=Path)
parser.add_argument("train", type=Path)
parser.add_argument("valid", type=Path)
args = parser.parse_args()

modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
code = [path.read_text(encoding="utf-8", errors="replace") for path in modules]
texts = {
    "wiki": (args.train.read_text(encoding="utf-8"), args.valid.read_text(encoding="utf-8")),
    "news": (demo.calibration_text(), demo.evaluation_texts()["news"]),
    "manual": (demo.language_reference(), demo.language_reference(unseen=True)),
    "code": ("\n\n".join(code[::2]), "\n\n".join(code[1::2])),
}
args.folder.mkdir(parents=True, exist_ok=True)
for name, (train, valid) in texts.items():
    (args.folder / f"{name}_train.txt").write_text(train[: LENGTHS[name]], encoding="utf-8")
    (args.folder / f"{name}_valid.txt").write_text(valid[:VALID], encoding="utf-8")
    print(f"{name}: {min(len(train), LENGTHS[name]):,} characters to train on, {min(len(valid), VALID):,} to judge by")

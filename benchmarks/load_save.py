"""How fast checkpoints are read and written, beside a plain copy of their shards: python benchmarks/load_save.py FOLDER

Bytes a second: of the copy; of loading the folder whole, each weight looked through for NaN, and left in the mapped
file; of opening it to be pruned, copied to memory of its own, with its tokenizer; of a model left in its files, every
page brought once; and of writing, whole and a page at a time, reload and comparison not counted.  The median of some
rounds; in each everything is done twice, and the second counts: a virtual machine takes time to find memory that was
not used for a while (a copy then takes three times as long).  The page cache is warm, and nothing waits to be written.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import results

from billhook.checkpoints import load as load_module
from billhook.checkpoints import save
from billhook.checkpoints.load import check_folder, open_model
from billhook.checkpoints.tokenizers import load_tokenizer
from billhook.runtime import offload

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path)
parser.add_argument("--rounds", type=int, default=5)
args = parser.parse_args()
size = save.stored_bytes(args.folder)


def copy(to: Path) -> None:
    for shard in args.folder.glob("*.safetensors"):
        shutil.copyfile(shard, to / shard.name)


def settle(to: Path) -> None:
    """A copy that is on the disk, as an output is once it has its name."""
    copy(to)
    for shard in to.glob("*.safetensors"):
        with shard.open("rb") as file:
            os.fsync(file.fileno())


def bring(_: Path) -> None:
    model = load_module.load(args.folder, stream=True)
    for page in offload.offloaded_modules(model):
        page.load()
        page.unload()


def load(_: Path) -> None:
    open_model(str(args.folder), device="cpu", dtype="bfloat16" if BF16 else "float32")


def look(_: Path) -> None:
    load_module.load(args.folder)


BF16 = check_folder(args.folder, str(args.folder)).dtype.itemsize == 2
whole, paged = load_module.load(args.folder), load_module.load(args.folder, stream=True)
tokenizer = load_tokenizer(args.folder, str(args.folder))
WAYS: dict[str, Callable[[Path], None]] = {
    "copy": copy,
    "copy, on the disk": settle,
    "load": look,
    "open to be pruned": load,
    "open, page by page": bring,
    "write": lambda to: save.save(whole, tokenizer, to, args.folder),
    "write, page by page": lambda to: save.save(paged, tokenizer, to, args.folder),
}
took: dict[str, list[float]] = {name: [] for name in WAYS}
for _ in range(args.rounds):
    for name, way in WAYS.items():
        for counts in (False, True):
            os.sync()  # or what was written before is written out meanwhile
            with tempfile.TemporaryDirectory(dir=args.folder.absolute().parent) as folder:
                started = time.perf_counter()
                way(Path(folder))
                if counts:
                    took[name].append(time.perf_counter() - started)
print(
    f"{args.folder.name}, {size / 1e9:.2f} GB\n\n| what | MB/s | of a copy | best | of the best copy |\n|---|---|---|---|---|"
)
for name, times in took.items():
    said = [f"{size / 1e6 / of(times):,.0f} | {of(took['copy']) / of(times):.0%}" for of in (statistics.median, min)]
    print(f"| {name} | {' | '.join(said)} |")
    row: dict[str, object] = {"model": args.folder, "what": name}
    for best, of in (("", statistics.median), ("best_", min)):
        row[f"{best}mb_per_second"] = size / 1e6 / of(times)
        row[f"share_of_{best}copy"] = of(took["copy"]) / of(times)
    results.write("load_save", [row])

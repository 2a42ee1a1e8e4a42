"""What sizes and layouts are worth where they are served: python benchmarks/serving.py FOLDER... [--llama-python
PYTHON] > table.md

For each checkpoint folder: parameters, bytes of its safetensors and of its GGUF (F16 and Q8_0), and tokens per second
of a 512-token prefill and of decoding at batch 1, in transformers (float32, the models in turns) and, where an
interpreter with llama-cpp-python is given, in llama.cpp (F16).  Medians, ranges in brackets.  Run it on an idle
machine.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import results
import torch

from billhook.checkpoints import load
from billhook.checkpoints.clients import llamacpp
from billhook.checkpoints.gguf.write import write_gguf
from billhook.evaluation import speed
from billhook.models.layout import layout_of
from billhook.models.sizes import total_parameters

ROUNDS = 3  # of all models in turns, in llama.cpp

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("models", nargs="+")
parser.add_argument("--llama-python")
parser.add_argument("--prompt", type=int, default=512)
parser.add_argument("--new-tokens", type=int, default=32)
args = parser.parse_args()

opened = [load.open_model(name, dtype="float32") for name in args.models]
speeds = [one for (one,) in speed.speeds([one.model for one in opened], [(1, args.prompt)], args.new_tokens)]
with tempfile.TemporaryDirectory() as work:
    files = [[Path(work) / f"{n}-{kind}.gguf" for kind in ("F16", "Q8_0")] for n in range(len(opened))]
    for one, (plain, packed) in zip(opened, files, strict=True):
        write_gguf(one.model, one.tokenizer, plain, "F16")
        write_gguf(one.model, one.tokenizer, packed, "Q8_0")
    sizes = [[file.stat().st_size for file in pair] for pair in files]
    layouts = [layout_of(one.model) for one in opened]
    counts = [total_parameters(one.model) for one in opened]
    vocabulary = opened[0].model.config.vocab_size
    opened.clear()  # their memory, before llama.cpp is timed
    prompt = torch.randint(vocabulary, (args.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    request = {"speed": {"prompt": prompt, "new_tokens": args.new_tokens, "repeats": 3}}
    found = [
        [llamacpp.run(args.llama_python, plain, request)["speed"] for plain, _ in files]
        for _ in range(ROUNDS if args.llama_python else 0)
    ]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f}-{max(values):.0f})" if values else "—"


print(
    "| model | layout | parameters | GGUF F16 | GGUF Q8_0 | prefill | decode | llama.cpp prefill | llama.cpp decode |"
)
print("|---|---|---|---|---|---|---|---|---|")
for n, (name, seen) in enumerate(zip(args.models, speeds, strict=True)):
    mega = " | ".join(f"{size / 1e6:.1f} MB" for size in sizes[n])
    own = " | ".join(
        f"{middle:.0f} ({least:.0f}-{most:.0f})"
        for middle, (least, most) in ((seen.prefill, seen.prefill_range), (seen.decode, seen.decode_range))
    )
    client = " | ".join(spread([turn[n][what] for turn in found]) for what in ("prefill", "decode"))
    print(f"| {Path(name).name} | {layouts[n]} | {counts[n]:,} | {mega} | {own} | {client} |")
    row = {"model": name, "layout": layouts[n], "prompt": args.prompt, "new_tokens": args.new_tokens}
    row |= {"parameters": counts[n], "f16_mb": sizes[n][0] / 1e6, "q8_0_mb": sizes[n][1] / 1e6}
    for what, middle, ends in (
        ("prefill", seen.prefill, seen.prefill_range),
        ("decode", seen.decode, seen.decode_range),
    ):
        row |= {what: middle, f"{what}_least": ends[0], f"{what}_most": ends[1]}
        if rates := [turn[n][what] for turn in found]:
            row |= {f"llama_{what}": statistics.median(rates)}
            row |= {f"llama_{what}_least": min(rates), f"llama_{what}_most": max(rates)}
    results.write("serving", [row])

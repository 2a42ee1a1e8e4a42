"""What a smaller vocabulary costs on other text: python benchmarks/vocabulary.py MODEL VOCABULARY_TEXT TEXT > table.md

Trims the vocabulary to VOCABULARY_TEXT, and to at least --sizes tokens, and prints bits per byte on the first
--characters of TEXT in windows of 512 tokens: what compares across tokenizers, as perplexity per token does not.
"""

import argparse
import copy
import math
from typing import Any

import results
import torch

from billhook import data
from billhook.checkpoints import load
from billhook.models import vocabulary

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("source", help="the text whose tokens stay")
parser.add_argument("text")
parser.add_argument("--sizes", default="0,32768,40960")
parser.add_argument("--characters", type=int, default=40_000)
args = parser.parse_args()

opened = load.open_model(args.model)
source, scored = data.calibration_text(args.source).text, data.calibration_text(args.text).text[: args.characters]


@torch.inference_mode()
def bits_per_byte(model: Any, tokenizer: Any) -> tuple[float, int]:
    ids = torch.tensor(tokenizer(scored, add_special_tokens=False).input_ids)
    nats, size = 0.0, 0
    for window in ids[: len(ids) // 512 * 512].view(-1, 512):
        logits = model(window[None], use_cache=False).logits[0, :-1]
        nats += torch.nn.functional.cross_entropy(logits.float(), window[1:], reduction="sum").item()
        size += len(tokenizer.decode(window[1:]).encode())
    return nats / math.log(2) / size, len(ids)


print("| tokens kept | parameters saved | bits per byte | tokens of the text |\n|---|---|---|---|")


def keep(at_least: int | None, kept: int, saved: int, bits: float, tokens: int) -> None:
    row = {"model": args.model, "source_text": args.source, "text": args.text, "characters": args.characters}
    row |= {"at_least": at_least, "kept": kept, "parameters_saved": saved, "bits_per_byte": bits, "tokens": tokens}
    results.write("vocabulary", [row])


bits, count = bits_per_byte(opened.model, opened.tokenizer)
print(f"| all {len(opened.tokenizer):,} | 0 | {bits:.3f} | {count:,} |", flush=True)
keep(None, len(opened.tokenizer), 0, bits, count)
for size in map(int, args.sizes.split(",")):
    model = copy.deepcopy(opened.model)
    tokenizer, cut = vocabulary.trim(model, opened.tokenizer, [source], at_least=size)
    bits, count = bits_per_byte(model, tokenizer)
    print(f"| {cut['kept']:,} | {cut['parameters_saved']:,} | {bits:.3f} | {count:,} |", flush=True)
    keep(size, cut["kept"], cut["parameters_saved"], bits, count)

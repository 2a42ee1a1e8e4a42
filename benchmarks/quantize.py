"""What few bits cost a model, by type and method: python benchmarks/quantize.py MODEL CALIBRATION TEXT > table.md

Every row quantises MODEL's layers, embedding and head at Q8_0, calibrated on --samples windows of 512 tokens of
CALIBRATION, and compares its predictions with MODEL's own on the first --windows windows of 512 tokens of TEXT: KL in
nats a token ± one standard error over windows, and the factor of its perplexity.  --also names models that are judged
beside it as they are: what `recover --bits` and `quantize` made of MODEL.  Weights that came from a 4-bit file,
as the demo's did, flatter 4 bits: give a model that was pruned or trained.
"""

import argparse
from dataclasses import asdict, replace
from typing import Any

import results

from billhook import data
from billhook.checkpoints import load
from billhook.evaluation.perplexity import perplexities
from billhook.planning.few_bits import Wanted
from billhook.pruning.quantize import quantize
from billhook.runtime.run import Run

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("calibration")
parser.add_argument("text")
parser.add_argument("--bits", default="Q4_0,Q4_1,Q5_0,Q8_0", help="types, with commas")
parser.add_argument("--methods", default="rtn,gptq", help="with commas; gptq:STREAM for another stream")
parser.add_argument("--also", default="", help="quantised models, with commas")
parser.add_argument("--samples", type=int, default=32)
parser.add_argument("--windows", type=int, default=16)
args = parser.parse_args()

dense = load.open_model(args.model, device="cpu", dtype="float32")
(text,) = data.evaluation_texts([args.text])
windows = data.windows(text, dense.tokenizer, 512)
windows = replace(windows, tokens=windows.tokens[: args.windows], bytes=windows.bytes[: args.windows])


def row(model: Any, bits: str, method: str, taken: float | None) -> None:
    """Print and keep what a model costs beside the dense one."""
    _, quality = perplexities([dense.model, model], windows, reference=True)
    against = quality.against
    assert against is not None
    kl = f"{against.kl:.5f} ± {against.kl_standard_error:.2g}"
    print(f"| {bits} | {method} | {taken or float('nan'):.2f} | {kl} | {against.factor:.4f} |", flush=True)
    told = {key: value for key, value in asdict(against).items() if key != "agreement"}
    key = {"model": args.model, "text": windows.source, "windows": args.windows, "type": bits, "method": method}
    key |= {"calibration": args.calibration, "samples": args.samples}
    results.write("quantize", [{**key, **told, "bits_per_weight": taken}])


print("| type | method | bits a weight | KL | factor |\n|---|---|---|---|---|", flush=True)
for name in filter(None, args.also.split(",")):
    row(load.open_model(name, device="cpu", dtype="float32", packed=True).model, name, "as it is", None)
for bits in filter(None, args.bits.split(",")):
    for named in args.methods.split(","):
        method, _, stream = named.partition(":")
        how = {"method": method, "calibration": args.calibration, "samples": args.samples}
        found = quantize(args.model, Wanted(bits=bits, stream=stream or "sequential", **how), Run())
        row(found.model, bits, named, found.record["quantized"]["bits_per_weight"])

"""Fewer experts in a small mixture: python benchmarks/mixtures.py CALIBRATION TEXT --results DIR > table.md

Trains a byte-level mixture of experts (--steps steps of 16 windows of 256 bytes, half of CALIBRATION and half of
Python's own standard library, seed 0; kept in DIR, never committed), then takes a quarter and a half of its experts
away in every way of `--method experts`, calibrated on either text or both (64 windows).  Perplexity of a byte over the
first --windows windows of 256 bytes of TEXT and of modules of the standard library that it was not trained on, ± one
standard error over pairs of windows.
"""

import argparse
import sys
import sysconfig
from pathlib import Path
from typing import Any

import results
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from billhook.checkpoints import load
from billhook.choices import WAYS
from billhook.cuts.experts import Settings, reduce_experts
from billhook.evaluation import perplexity
from billhook.models.axes import axes
from billhook.models.experts import fuse
from billhook.models.layout import update_config
from billhook.models.plan import Plan
from billhook.runtime.run import Run

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("calibration")
parser.add_argument("text")
parser.add_argument("--results", type=Path, default=Path("mixture-results"))
parser.add_argument("--steps", type=int, default=600)
parser.add_argument("--windows", type=int, default=64)
parser.add_argument("--seeds", type=int, default=3, help="of random drops")
args = parser.parse_args()

LENGTH, ROWS, HELD_OUT = 256, 16, ("ast.py", "argparse.py", "difflib.py", "typing.py", "zipfile.py")
SHAPE: dict[str, Any] = dict(
    vocab_size=258,
    hidden_size=192,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    num_local_experts=16,
    num_experts_per_tok=2,
    max_position_embeddings=512,
    router_aux_loss_coef=0.01,
    output_router_logits=True,  # for the loss that keeps experts in use; off once it is trained
    bos_token_id=256,
    eos_token_id=257,
    tie_word_embeddings=True,
)


def windows(text: str) -> torch.Tensor:
    found = torch.tensor(list(text.encode()), dtype=torch.long)
    return found[: len(found) // LENGTH * LENGTH].view(-1, LENGTH)


def library(held_out: bool) -> str:
    """Python's own modules in a fixed order; generated tables left out."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return "\n".join(p.read_text(errors="ignore") for p in paths if (p.name in HELD_OUT) == held_out)


def trained(folder: Path, prose: torch.Tensor, code: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SHAPE))
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3, (0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, args.steps, pct_start=0.1)
    draw = torch.Generator().manual_seed(0)
    for step in range(args.steps):
        rows = [one[torch.randint(len(one), (ROWS // 2,), generator=draw)] for one in (prose, code)]
        ids = torch.cat(rows)
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: {loss.item():.3f}", file=sys.stderr, flush=True)
    model.config.output_router_logits = False
    model.eval().save_pretrained(folder)
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves in byte-level BPE
    others = [b for b in range(256) if b not in kept]
    symbols = {
        chr(b if b in kept else 256 + others.index(b)): b for b in range(256)
    }  # so that a byte's id is its value
    backend = Tokenizer(models.BPE(vocab=symbols | {"<s>": 256, "</s>": 257}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


@torch.no_grad()
def losses(model: Any, ids: torch.Tensor) -> list[float]:
    """Mean loss of each window."""
    logits = model(ids).logits[:, :-1].float().log_softmax(-1)
    return (-logits.gather(2, ids[:, 1:, None]).mean((1, 2))).tolist()


prose, code = windows(Path(args.calibration).read_text()), windows(library(False))
judged = {"prose": windows(Path(args.text).read_text())[: args.windows], "code": windows(library(True))[: args.windows]}
folder = args.results / f"mixture-{args.steps}"
if not folder.is_dir():
    trained(folder, prose, code)
draw = torch.Generator().manual_seed(1)
some = {name: one[torch.randperm(len(one), generator=draw)[:64]] for name, one in (("prose", prose), ("code", code))}
some["both"] = torch.cat([some["prose"][:32], some["code"][:32]])[torch.randperm(64, generator=draw)]


def cells(model: Any) -> str:
    found = []
    for name, ids in judged.items():
        factor, error = perplexity.paired(dense[name], losses(model, ids))
        found.append(f"{perplexity.perplexity_of(losses(model, ids)):.3f} (×{factor:.3f} ± {error:.3f})")
    return " | ".join(found)


def keep(model: Any, **how: Any) -> None:
    rows = []
    for name, ids in judged.items():
        after = losses(model, ids)
        factor, error = perplexity.paired(dense[name], after)
        rows.append(
            {"text": name, "perplexity": perplexity.perplexity_of(after), "factor": factor, "standard_error": error}
        )
    results.write("mixtures", [{"steps": args.steps, "windows": args.windows, **how, **row} for row in rows])


opened = load.open_model(str(folder), device="cpu")
dense = {name: losses(opened.model, ids) for name, ids in judged.items()}
print("| experts gone | way | calibrated on | prose | code |")
print("|---|---|---|---|---|")
print(f"| none | | | {cells(opened.model)} |", flush=True)
keep(opened.model, gone=0)
for gone in (4, 8):
    for way in WAYS:
        for source in ("both",) if way == "random" else some:
            for seed in range(args.seeds if way == "random" else 1):
                model = load.open_model(str(folder), device="cpu").model
                plan = Plan({(axis.layer, "experts"): gone for axis in axes(model, ("experts",))})
                reduce_experts(model, some[source], plan, Settings(way, seed), Run())
                fuse(model)
                update_config(model)
                print(
                    f"| {gone} of 16 | {way} | {source if way != 'random' else f'seed {seed}'} | {cells(model)} |",
                    flush=True,
                )
                keep(model, gone=gone, way=way, calibrated_on=source, seed=seed if way == "random" else None)

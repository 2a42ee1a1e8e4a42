"""Where benchmarks leave their numbers: benchmarks/results/NAME.csv, one row for each thing that was measured.

First come the settings that tell the rows of a table apart, then what was measured, then how: `command`, `source` (the
entry of the lab book that a row was carried from; empty where a run wrote it), `date`, `commit` and `versions`.  A run
replaces the row of the same settings and adds the others, so that a table always holds the last measurement of
everything.  Texts stand in rows of their own.  Factors are to the unpruned model's; standard errors are the factors',
over pairs of windows.
"""

import csv
import datetime
import importlib.metadata
import io
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from billhook.runtime import atomic

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "results"
HOW = ("command", "source", "date", "commit", "versions")
JUDGED = "perplexity factor standard_error"
BOTH = "perplexity perplexity_error factor standard_error"
SPREAD = "seconds least most"
TABLES: dict[str, tuple[str, str]] = {  # name -> settings that tell rows apart, and numbers
    "allocation": (
        "model calibration dtype evaluate_dtype ratio layout allocation probes text",
        "parameters perplexity factor widths",
    ),
    "auto": ("model calibration samples windows ratio seed row text", f"parameters chosen {JUDGED} seconds"),
    "check_vllm": ("checkpoint layout differs", "vllm"),
    "compare": ("model calibration samples windows ratio contender text", f"parameters {BOTH} seconds"),
    "depth": (
        "model train ratio preset dropped patch tokens lr trainable objective states windows precision text",
        f"{JUDGED} tokens_per_second seconds",
    ),
    "depth_latency": (
        "model layers timed context",
        "parameters prefill_ms prefill_least prefill_most prefill_speedup step_ms step_least step_most step_speedup",
    ),
    "dry_run": ("model method samples seq_len streamed stage", "said measured"),
    "evaluate_cost": ("model windows samples what", f"{SPREAD} beside"),
    "fasp_table": (
        "model calibration windows evaluate_dtype stream score damping correction restored ratio text",
        "parameters perplexity factor",
    ),
    "llm_compressor": (
        "model calibration samples windows precision zeros method by text",
        f"{JUDGED} share_of_zeros seconds",
    ),
    "gpu": ("card size row what", "seconds floor bare peak_gib said"),
    "kv_cache": ("model calibration samples windows kv seed row text", f"share parameters {JUDGED} seconds decode"),
    "load_save": ("model what", "mb_per_second share_of_copy best_mb_per_second share_of_best_copy"),
    "low_rank": ("model calibration samples seed layers share moment role", "error error_held_out"),
    "mask_errors": ("model calibration samples zeros method role", "error error_held_out"),
    "mask_operators": ("model calibration samples layers zeros method", "error error_held_out seconds"),
    "masks": (
        "model calibration samples windows precision zeros method text",
        f"{JUDGED} forward_seconds gram_seconds solver_seconds errors_seconds",
    ),
    "mixtures": ("steps windows gone way calibrated_on seed text", JUDGED),
    "patch": (
        "model calibration samples windows autocast layers cut patch damping correction text",
        "perplexity factor errors seconds",
    ),
    "prune_cost": (
        "model calibration stream score ratio samples seq_len",
        "plain_forward_seconds fasp_seconds forwards least most forward_part gram_part score_part restoration_part errors_part "
        "peak_mib",
    ),
    "quantize": (
        "model calibration samples windows type method text",
        "bits_per_weight kl kl_standard_error factor factor_standard_error",
    ),
    "recipes": ("recipe number", "expected measured within"),
    "recover_cost": ("student rows what", "parameters tokens_per_second least most beside"),
    "recovery": (
        "student teacher train row tokens lr schedule states batch_tokens seed windows precision text",
        f"{JUDGED} rate trained_parameters tokens_per_second peak_mib",
    ),
    "recovery_losses": ("student row tokens lr schedule steps", "loss"),
    "refinement": (
        "model calibration samples fitted windows drop ratio patch precision length passes rate rows text",
        f"{JUDGED} seconds",
    ),
    "submodules": ("model calibration windows seed row layers", "gone divergence"),
    "roads": (
        "dense calibration samples windows road text",
        "bytes kl kl_standard_error factor factor_standard_error prefill decode",
    ),
    "search": (
        "model train ratio trials layout samples windows precision row restoration text",
        f"{JUDGED} least most",
    ),
    "search_cost": ("model what", f"{SPREAD} forward_passes"),
    "search_gains": ("model ratio row step", "nats"),
    "search_overfit": (
        "model ratio row promoted text",
        "trials gain_validation gain_judged share_that_lasts rank_correlation",
    ),
    "seeds": (
        "model calibration samples windows ratio seed row settings text",
        f"parameters {JUDGED} seconds processor_seconds",
    ),
    "serving": (
        "model layout prompt new_tokens",
        "parameters f16_mb q8_0_mb prefill prefill_least prefill_most decode decode_least decode_most llama_prefill "
        "llama_prefill_least llama_prefill_most llama_decode llama_decode_least llama_decode_most",
    ),
    "slicegpt": ("model calibration samples rotated refitted windows text", BOTH),
    "startup": ("line", "cpu_seconds imports_torch"),
    "streaming_cost": ("layers width", "seconds peak_mib peak_mib_with_write"),
    "sweep": ("model calibration samples stream ratio text", f"decoder_removed parameters {BOTH}"),
    "trials": ("model calibration ratio layout seed fitted judged cut", "loss behind standard_error seconds"),
    "values": ("model calibration samples windows share seed basis text", f"parameters error {JUDGED}"),
    "vocabulary": ("model source_text text characters at_least", "kept parameters_saved bits_per_byte tokens"),
    "while_training": (
        "model calibration tokens seq_len windows seed rate ratio row text",
        f"parameters before after {JUDGED}",
    ),
    "zeroshot": ("model task limit", "documents chance acc acc_error acc_norm acc_norm_error same_as_lm_eval"),
}


def columns(name: str) -> list[str]:
    """The header of a table."""
    return [*" ".join(TABLES[name]).split(), *HOW]


def read(name: str, folder: Path = FOLDER) -> list[dict[str, str]]:
    """The rows of a table; none where it was never measured."""
    path = folder / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(name: str, rows: Iterable[Mapping[str, object]], folder: Path = FOLDER) -> Path:
    """Put rows into a table: in the place of those with the same settings, or at its end.

    Values are written as they are, floats with six digits, None as nothing, folders by their last name.

    Raises:
        KeyError: a column that the table does not have.
    """
    header, settings = columns(name), TABLES[name][0].split()
    kept = {tuple(row[key] for key in settings): row for row in read(name, folder)}
    how = dict(zip(HOW, (command(), "", datetime.date.today().isoformat(), commit(), versions()), strict=True))
    for given in rows:
        if alien := sorted(set(given) - set(header)):
            raise KeyError(f"{name}.csv has no column {alien[0]}")
        row = {key: said({**how, **given}.get(key)) for key in header}
        kept[tuple(row[key] for key in settings)] = row
    text = io.StringIO()
    out = csv.DictWriter(text, header, lineterminator="\n")
    out.writeheader()
    out.writerows(kept.values())
    folder.mkdir(exist_ok=True)
    atomic.write_text(folder / f"{name}.csv", text.getvalue())
    return folder / f"{name}.csv"


def said(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return short(str(value))


def short(text: str) -> str:
    """A path by its last name, so that tables compare whatever machine they were made on; other text as it is."""
    return Path(text).name if os.sep in text and os.path.exists(text) else text


def command() -> str:
    """How this process was started."""
    script = Path(sys.argv[0]).resolve()
    place = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return shlex.join(["python", str(place), *map(short, sys.argv[1:])])


def commit() -> str:
    """The commit that was measured, marked where the package differs from it; nothing outside a repository."""

    def git(*asked: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(ROOT), *asked], capture_output=True, text=True)

    try:
        head = git("rev-parse", "--short", "HEAD")
        changed = git("diff", "--quiet", "HEAD", "--", "src").returncode
    except OSError:  # no git
        return ""
    return "" if head.returncode else head.stdout.strip() + ("-changed" if changed else "")


def versions() -> str:
    libraries = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers")]
    return ", ".join([f"python {platform.python_version()}", *libraries])

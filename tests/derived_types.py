"""What a derived row offers for every causal type that transformers registers: docs/derived.json.

    python tests/derived_types.py [TYPE...]

Types that the file has, of the same transformers, are left as they are, but those named.  Each is tried in a process of
its own, and given up after LIMIT seconds.
"""

import contextlib
import json
import multiprocessing
import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, __version__
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from billhook.errors import BillhookError, reason
from billhook.models import families, multimodal, proof
from billhook.models.families import FAMILIES
from billhook.models.shrink import default
from billhook.runtime.quiet import quiet_transformers

FILE = Path(__file__).parent.parent / "docs" / "derived.json"
LIMIT = 300  # seconds
TYPES = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING and name not in FAMILIES]
SAMPLE = (  # of many shapes: for the fast suite
    *("gemma", "cohere2", "olmo3", "ministral3", "glm4", "phi", "starcoder2", "gptj", "gpt_bigcode", "nanochat"),
    *("apertus", "arcee", "helium", "persimmon", "biogpt", "granitemoe", "bert", "recurrent_gemma", "ernie4_5_moe"),
    "bamba",
)
LFM = ["conv", "conv", "full_attention", "conv"]
SETTINGS: dict[str, dict[str, Any]] = {  # of types whose default config is no whole model: as released ones have them
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "dots1": {"n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 2, "first_k_dense_replace": 1},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "granitemoehybrid": {"layer_types": [*["linear_attention"] * 7, "full_attention"] * 4},
    "jamba": {"num_hidden_layers": 32},
    "lfm2": {"layer_types": LFM * 8, "full_attn_idxs": None},
    "lfm2_moe": {"layer_types": LFM * 8},
    "xmod": {"default_language": "en_XX"},
}


def row_of(model_type: str) -> dict[str, Any]:
    """Kinds that were proved on the default config of a type, and why others were not."""
    try:
        config: Any = default(model_type, **SETTINGS.get(model_type, {}))
        if getattr(config, "is_encoder_decoder", False):
            return _none("an encoder-decoder: billhook prunes decoder-only causal LMs")
        if getattr(config, "text_config", None) is not None:
            there = "its text decoder is pruned where it stands"
            alone = "save its language model by itself first"
            return _none(f"multimodal: {there if model_type in multimodal.MULTIMODAL else alone}")
        if "is_decoder" in config.to_dict():
            config.is_decoder = True
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            told = proof.told(proof.proved(config), model_type)
    except BillhookError as error:
        return _none(str(error))
    except Exception as error:  # what a class of transformers raises on its default config, or on a small one
        return _none(f"no small model of its default config can be tried ({type(error).__name__}: {reason(error)})")
    refused = {kinds: why for kinds, why in told["refused"].items() if "heads" not in kinds}
    return {"proved": told["proved"], "refused": refused}


def _none(why: str) -> dict[str, Any]:
    return {"proved": [], "refused": {"all": why}}


def _send(model_type: str, to: Connection) -> None:
    torch.set_num_threads(1)
    families.DERIVED.clear()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        to.send(row_of(model_type))


def tried(model_type: str) -> dict[str, Any]:
    """`row_of` in a process of its own, which may hang or die."""
    here, there = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_send, args=(model_type, there))
    child.start()
    there.close()
    try:
        return here.recv() if here.poll(LIMIT) else _none(f"its small model took more than {LIMIT} s")
    except EOFError:
        return _none("the process that tried a small model of it died")
    finally:
        child.kill()
        child.join()


def written(rows: dict[str, Any]) -> str:
    """The file: a type a line."""
    lines = [f"  {json.dumps(name)}: {json.dumps(rows[name])}" for name in sorted(rows)]
    return f'{{\n "transformers": "{__version__}",\n "types": {{\n' + ",\n".join(lines) + "\n }\n}\n"


def main(names: list[str]) -> None:
    """Try every type that the file lacks, and those named; the file is whole after each."""
    kept = json.loads(FILE.read_text()) if FILE.exists() else {}
    rows = kept.get("types", {}) if kept.get("transformers") == __version__ else {}
    for name in names or [one for one in TYPES if one not in rows]:
        rows[name] = tried(name)
        FILE.write_text(written({one: rows[one] for one in rows if one in TYPES}))
        sys.stdout.write(f"{name}: {', '.join(rows[name]['proved']) or 'refused'}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])

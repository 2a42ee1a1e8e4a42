"""What a derived row offers for every causal type that transformers registers: python tests/derived_types.py >
docs/derived.json"""

import json
import sys
from typing import Any

import torch
from transformers import CONFIG_MAPPING, __version__
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from billhook.errors import BillhookError, first_line
from billhook.models import proof
from billhook.models.families import FAMILIES
from billhook.models.shrink import default
from billhook.runtime.quiet import quiet_transformers

SAMPLE = (  # of many shapes: for the fast suite
    *("gemma", "cohere2", "olmo3", "ministral3", "glm4", "phi", "starcoder2", "gptj", "gpt_bigcode", "nanochat"),
    *("apertus", "arcee", "helium", "persimmon", "biogpt", "granitemoe", "flex_olmo", "qwen3_5_text", "deepseek_v3"),
    "qwen3_next",
)


def row_of(model_type: str) -> dict[str, Any]:
    """Kinds that were proved on the default config of a type, and why others were not."""
    try:
        config: Any = default(model_type)
        if getattr(config, "is_encoder_decoder", False):
            return _none("an encoder-decoder: billhook prunes decoder-only causal LMs")
        if getattr(config, "text_config", None) is not None:
            return _none("multimodal: save its language model by itself first")
        if "is_decoder" in config.to_dict():
            config.is_decoder = True
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            row = proof.proved(config)
    except BillhookError as error:
        return _none(str(error))
    except Exception as error:  # what a class of transformers raises on its default config, or on a small one
        return _none(f"no small model of its default config can be tried ({type(error).__name__}: {first_line(error)})")
    ours = [refusal for refusal in row.refusals if "heads" not in refusal.kinds]
    return {"proved": list(proof.offered(row)), "refused": {", ".join(refusal.kinds): refusal.why for refusal in ours}}


def _none(why: str) -> dict[str, Any]:
    return {"proved": [], "refused": {"all": why}}


def every() -> dict[str, Any]:
    """By type, of those that have no row by hand."""
    types = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING and name not in FAMILIES]
    return {"transformers": __version__, "types": {name: row_of(name) for name in types}}


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(every(), indent=1) + "\n")

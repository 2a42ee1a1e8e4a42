"""Keys that transformers 4 reads in a checkpoint, beside those that transformers 5 writes; both then read alike."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from billhook.runtime.documents import read_object

ROTARY = ("rope_theta", "partial_rotary_factor")  # keys of rope_parameters that transformers 4 has at the top level
ORIGINAL = "original_max_position_embeddings"
FULL, LOCAL = "full_attention", "sliding_attention"  # kinds of layer whose rotary parameters differ
LOCAL_THETA = "rope_local_base_freq"
EXTRA, OLDER_EXTRA = "extra_special_tokens", "additional_special_tokens"  # keys of a list of tokens, new and old
TOKENIZERS = {"TokenizersBackend": "PreTrainedTokenizerFast"}  # classes of transformers 5, under names that both know


def with_older_keys(config: Mapping[str, Any], rotary: tuple[str, str], kind_key: str) -> dict[str, Any]:
    """A config with the keys of transformers 4, too, which silently takes defaults where they are missing.

    Args:
        rotary: the names of ROTARY's two keys in the family's class of transformers 4.
        kind_key: its key for the kind of scaling; where that is `type`, the scaling may have no other keys than its
            own.
    """
    extended = dict(config)
    if "dtype" in extended:
        extended["torch_dtype"] = extended["dtype"]
    rope = extended.get("rope_parameters")
    if not rope:
        return extended
    if FULL in rope:  # one for each kind of layer
        extended[LOCAL_THETA] = (rope.get(LOCAL) or {}).get("rope_theta")
        rope = rope[FULL] or {}
    extended |= {name: rope[key] for key, name in zip(ROTARY, rotary, strict=True) if key in rope}
    kind = rope.get("rope_type", "default")
    scaling = {kind_key: kind} | {
        key: value for key, value in rope.items() if key not in (*ROTARY, "rope_type", "type")
    }
    if kind == "longrope" and ORIGINAL in scaling:
        extended[ORIGINAL] = scaling[ORIGINAL]
        scaling = {key: value for key, value in scaling.items() if key != ORIGINAL or kind_key != "type"}
    extended["rope_scaling"] = None if kind == "default" else scaling
    return extended


def name_tokenizer(folder: Path) -> None:
    """Rewrite the folder's tokenizer_config.json, if transformers 5 wrote it, in words that transformers 4 knows."""
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return
    config = read_object(file, str(file), "write it again")
    if (class_name := TOKENIZERS.get(str(config.get("tokenizer_class")))) is None:
        return
    config["tokenizer_class"] = class_name
    if isinstance(config.get(EXTRA), list):
        config[OLDER_EXTRA] = config.pop(EXTRA)
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

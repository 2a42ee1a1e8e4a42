"""What readers of transformers 4 look for in a checkpoint, beside what transformers 5 writes; both read the same from it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from billhook.runtime.documents import read_object

ROTARY = ("rope_theta", "partial_rotary_factor")  # keys of rope_parameters that transformers 4 has at the top
ORIGINAL = "original_max_position_embeddings"
FULL, LOCAL = "full_attention", "sliding_attention"  # kinds of layer whose rotary parameters differ
LOCAL_THETA = "rope_local_base_freq"
EXTRA, OLDER_EXTRA = "extra_special_tokens", "additional_special_tokens"  # a list of them
TOKENIZERS = {"TokenizersBackend": "PreTrainedTokenizerFast"}  # what transformers 5 calls it, and both know


def with_older_keys(config: Mapping[str, Any], rotary: tuple[str, str], kind_key: str) -> dict[str, Any]:
    """What config.json says, under the keys of transformers 4 too: without them it takes its defaults, without a word.

    Args:
        rotary: what the family's class calls ROTARY's two there.
        kind_key: and the kind of scaling; one that has it as `type` takes nothing that is not the scaling's own.
    """
    found = dict(config)
    if "dtype" in found:
        found["torch_dtype"] = found["dtype"]
    given = found.get("rope_parameters")
    if not given:
        return found
    if FULL in given:  # one for each kind of layer
        found[LOCAL_THETA] = (given.get(LOCAL) or {}).get("rope_theta")
        given = given[FULL] or {}
    found |= {name: given[key] for key, name in zip(ROTARY, rotary, strict=True) if key in given}
    kind = given.get("rope_type", "default")
    rest = {kind_key: kind} | {key: value for key, value in given.items() if key not in (*ROTARY, "rope_type", "type")}
    if kind == "longrope" and ORIGINAL in rest:
        found[ORIGINAL] = rest[ORIGINAL]
        rest = {key: value for key, value in rest.items() if key != ORIGINAL or kind_key != "type"}
    found["rope_scaling"] = None if kind == "default" else rest
    return found


def name_tokenizer(folder: Path) -> None:
    """Have the folder's tokenizer_config.json, if transformers 5 wrote it, say the same in words that transformers 4 has too."""
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return
    said = read_object(file, str(file), "write it again")
    if (known := TOKENIZERS.get(str(said.get("tokenizer_class")))) is None:
        return
    said["tokenizer_class"] = known
    if isinstance(said.get(EXTRA), list):
        said[OLDER_EXTRA] = said.pop(EXTRA)
    file.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

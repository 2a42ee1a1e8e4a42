"""Flags in config.json about every forward: more outputs, or outputs of other types.

They are kept for the output's config.json, and change nothing that billhook does.
"""

import json
from pathlib import Path
from typing import Any

PLAIN = {
    "output_attentions": False,
    "output_hidden_states": False,
    "output_router_logits": False,
    "return_dict": True,
}
CHOICES = ("attn_implementation", "experts_implementation")  # keys that transformers reads but does not save


def flags_in(folder: Path) -> dict[str, Any]:
    """The flags of a folder's config.json, unchanged."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {key: config[key] for key in (*PLAIN, *CHOICES) if key in config}


def with_plain_flags(config: Any) -> Any:
    """Reset a config's flags to their defaults; returns the config."""
    for key, value in PLAIN.items():
        if hasattr(config, key):
            setattr(config, key, value)
    return config


def remember(model: Any, folder: Path) -> None:
    """Keep the flags of a model's folder with the model."""
    model.flags_said = flags_in(folder)


def remembered(model: Any) -> dict[str, Any]:
    """The flags that `remember` kept."""
    return getattr(model, "flags_said", {})

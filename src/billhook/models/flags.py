"""What config.json asks of every forward: to put out more, or other types.  It is carried along, and decides nothing that billhook does."""

import json
from pathlib import Path
from typing import Any

PLAIN = {
    "output_attentions": False,
    "output_hidden_states": False,
    "output_router_logits": False,
    "return_dict": True,
}
CHOICES = ("attn_implementation", "experts_implementation")  # which transformers reads, and leaves out when it saves


def flags_in(folder: Path) -> dict[str, Any]:
    """Those of a folder's config.json, as they are there."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {key: config[key] for key in (*PLAIN, *CHOICES) if key in config}


def with_plain_flags(config: Any) -> Any:
    """The same config, its forwards asking for what they do by themselves."""
    for key, value in PLAIN.items():
        if hasattr(config, key):
            setattr(config, key, value)
    return config


def remember(model: Any, folder: Path) -> None:
    """Have a model remember those of its folder."""
    model.flags_said = flags_in(folder)


def remembered(model: Any) -> dict[str, Any]:
    """What `carry` had it remember."""
    return getattr(model, "flags_said", {})

"""Forward passes that go on from another by its cache of keys and values."""

from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast

# transformers 5.24 renamed both the field of the output and the argument, and warns of the old ones
NAME = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


def after(step: Any) -> dict[str, Any]:
    """What to pass to a model for it to go on behind the tokens of `step`, an output that was asked for with `use_cache=True`."""
    return {NAME: getattr(step, NAME), "use_cache": True}

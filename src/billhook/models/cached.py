"""Forward passes that continue another one by its cache of keys and values."""

from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast

# transformers 5.24 renamed both the output's field and the argument, and warns about the old names
NAME = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


def after(step: Any) -> dict[str, Any]:
    """The arguments for a model to continue after the tokens of `step`, an output of a call with `use_cache=True`."""
    return {NAME: getattr(step, NAME), "use_cache": True}

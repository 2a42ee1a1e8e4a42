"""Multimodal models whose text decoder is pruned where it stands: which they are, and their decoder as a causal LM.

On text such a decoder computes what a causal LM does: it is opened, cut and judged as one.  What stands around it, and
what its folder has more, is billhook.checkpoints.around's business.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedModel

from billhook.errors import ModelError, reason
from billhook.runtime.headers import shown

# text types without a causal LM: one that computes the same
CAUSAL = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
PLANES = ("mrope_section", "mrope_interleaved", "type")  # of rotary parameters: on text all three positions are one
TEXT = "text_config"


@dataclass(frozen=True)
class Around:
    """What a text decoder stands in."""

    model_type: str
    kept_layers: int = 0  # so many first layers have image features added to what they put out, by their number


# model type -> config key, in vision_config, of a list as long as the number of kept layers; '' where all can go
MULTIMODAL = {
    **dict.fromkeys(("gemma3", "gemma4", "llava", "llava_next", "llava_onevision", "mistral3"), ""),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe"), ""),
    "qwen3_vl": "deepstack_visual_indexes",
}
REFUSED = {"mllama": "its decoder reads the image in layers of cross-attention, which text never runs"}


def around(content: Mapping[str, Any]) -> Around | None:
    """What the decoder of a config.json stands in; None for a model of text alone.

    Raises:
        BillhookError: it is multimodal, and its decoder cannot be pruned where it stands; or transformers refuses it.
    """
    kind = str(content.get("model_type"))
    if (
        not isinstance(content.get(TEXT), dict) and kind not in MULTIMODAL
    ):  # some have the decoder's keys among their own
        return None
    if kind not in MULTIMODAL:
        why = REFUSED.get(kind, f"billhook prunes the text decoder of {', '.join(MULTIMODAL)} where it stands")
        raise ModelError(
            f"it is multimodal ({shown(kind)}): {why}; save its language model by itself first, as a causal LM of type "
            f"{shown(str(content[TEXT].get('model_type', kind)))}"
        )
    listed = getattr(_read(content).vision_config, MULTIMODAL[kind]) if MULTIMODAL[kind] else ()
    return Around(kind, len(listed))


def decoder_config(content: dict[str, Any]) -> dict[str, Any]:
    """The config of a multimodal model's text decoder as a causal LM; of a model of text alone, `content` itself.

    Raises:
        BillhookError: as `around`.
    """
    if around(content) is None:
        return content
    whole = _read(content)
    text = whole.get_text_config().to_dict()
    own: dict[str, Any] = {"model_type": CAUSAL.get(text["model_type"], text["model_type"])}
    own |= {"tie_word_embeddings": whole.tie_word_embeddings}
    if dtype := content.get("dtype") or content.get("torch_dtype"):
        own["dtype"] = dtype
    if rotary := text.get("rope_parameters"):
        own["rope_parameters"] = {key: value for key, value in rotary.items() if key not in PLANES}
    return {key: value for key, value in text.items() if key != "architectures"} | own


def _read(content: Mapping[str, Any]) -> Any:
    """transformers' config of a config.json."""
    try:
        return CONFIG_MAPPING[content["model_type"]].from_dict(dict(content))
    except Exception as error:  # transformers raises many kinds
        raise ModelError(f"config.json: transformers could not read it ({reason(error)})") from error


def type_of(model: PreTrainedModel) -> str:
    """The model type of what a checkpoint holds: of the whole, where an opened model is its text decoder."""
    stands = within(model)
    return stands.model_type if stands else model.config.model_type


def within(model: PreTrainedModel) -> Around | None:
    """What an opened model is the text decoder of."""
    return getattr(model, "stands_in", None)

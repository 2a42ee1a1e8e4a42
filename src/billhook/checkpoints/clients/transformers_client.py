"""Run by a Python that has transformers and nothing of billhook: a checkpoint and a request in, JSON out.

    python checkpoints/clients/transformers_client.py FOLDER < request.json

A request holds `prompts`, lists of token ids of one length; `new_tokens`, how many to add; `threads`, how many to use;
and `model_code` and `tokenizer_code`, whether code of the folder may run.

The answer holds the logits of the prompts (float32, base64), the greedy continuations with and without a cache, the
number of parameters, the client's version, and why it refuses generation_config.json, if it does.  The continuations
use none of the settings in that file.
"""

import base64
import json
import os
import sys
from typing import Any

import torch
import transformers


def main():
    """Keep standard output for the answer, whatever libraries print there."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    folder, request = sys.argv[1], json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    model = opened(folder, request["model_code"])
    transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=request["tokenizer_code"])
    ids = torch.tensor(request["prompts"])
    with torch.no_grad():
        logits = model(ids).logits.float()
        greedy = [generated(model, ids, request["new_tokens"], cache) for cache in (True, False)]
    rows = base64.b64encode(logits.contiguous().numpy().astype("<f4").tobytes()).decode()
    answer = {
        "version": transformers.__version__,
        "parameters": sum({t.data_ptr(): t.numel() for t in model.state_dict().values()}.values()),
        "logits": {"shape": list(logits.shape), "float32": rows},
        "greedy": greedy[0],
        "greedy_without_cache": greedy[1],
        "stock": sys.modules.get("billhook") is None,
        "refused_generation_config": refused_settings(folder),
    }
    json.dump(answer, channel)
    channel.close()


def opened(folder, model_code):
    """The model in float32, none of its generation settings with it."""
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=model_code)
    multimodal = getattr(config, "text_config", None) is not None
    auto = transformers.AutoModelForImageTextToText if multimodal else transformers.AutoModelForCausalLM
    model: Any = auto.from_pretrained(
        folder,
        dtype=torch.float32,
        trust_remote_code=model_code,
        use_safetensors=True,
        generation_config=transformers.GenerationConfig(),  # in place of the folder's, which may be broken
    ).eval()
    model.config.return_dict = True  # whatever config.json asks for
    model.generation_config = transformers.GenerationConfig()  # nor any that config.json has
    return model


def generated(model, ids, new_tokens, use_cache):
    """The tokens that `generate` adds, the likeliest each time; nothing ends them early."""
    settings = transformers.GenerationConfig(max_new_tokens=new_tokens, do_sample=False, use_cache=use_cache)
    made = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return made[:, ids.shape[1] :].tolist()


def refused_settings(folder):
    """Why this transformers cannot read generation_config.json; empty where it can, or there is none."""
    if not os.path.exists(os.path.join(folder, "generation_config.json")):
        return ""
    try:
        transformers.GenerationConfig.from_pretrained(folder)
    except Exception as error:  # OSError, ValueError, TypeError… by what is wrong in it
        return str(error).strip().split("\n")[0] or type(error).__name__
    return ""


if __name__ == "__main__":
    main()

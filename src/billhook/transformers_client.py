"""Run by a Python that has transformers and nothing of billhook: a checkpoint and a request in, JSON out.

    python transformers_client.py FOLDER < request.json

`prompts` are lists of token ids of one length, `new_tokens` how many to add, `threads` how many to use.  The answer holds the logits of the prompts
(float32, base64), the greedy continuations with and without a cache, the number of parameters, and the client's version.
A checkpoint that names its own modelling file is one that billhook wrote: the file is run.
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
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        own_code = "auto_map" in json.load(file)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=own_code, use_safetensors=True
    ).eval()
    transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=own_code)
    ids = torch.tensor(request["prompts"])
    with torch.no_grad():
        logits = model(ids).logits.float()
        greedy = [
            model.generate(
                ids,
                max_new_tokens=request["new_tokens"],
                eos_token_id=model.config.vocab_size,  # none: go on to the last
                do_sample=False,
                use_cache=cache,
                pad_token_id=0,
            )[:, ids.shape[1] :].tolist()
            for cache in (True, False)
        ]
    rows = base64.b64encode(logits.contiguous().numpy().astype("<f4").tobytes()).decode()
    answer = {
        "version": transformers.__version__,
        "parameters": sum({t.data_ptr(): t.numel() for t in model.state_dict().values()}.values()),
        "logits": {"shape": list(logits.shape), "float32": rows},
        "greedy": greedy[0],
        "greedy_without_cache": greedy[1],
        "stock": "billhook" not in sys.modules,
    }
    json.dump(answer, channel)
    channel.close()


if __name__ == "__main__":
    main()

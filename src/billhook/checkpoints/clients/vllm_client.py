"""Run by a Python that has vLLM and nothing of billhook: a checkpoint and a request in, JSON out.

    python checkpoints/clients/vllm_client.py FOLDER < request.json

`prompts` are lists of token ids, `new_tokens` how many to add, greedily; `model_code` says whether code of the folder
may run; the answer holds the continuations.
"""

import json
import sys

import vllm  # pyright: ignore[reportMissingImports]


def main():
    """The answer is the last line of standard output; vLLM may print before it."""
    folder, request = sys.argv[1], json.load(sys.stdin)
    longest = max(map(len, request["prompts"])) + request["new_tokens"]
    model = vllm.LLM(
        model=folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=longest,
        max_num_seqs=4,
        skip_tokenizer_init=True,
        trust_remote_code=request["model_code"],
        generation_config="vllm",  # its own defaults, and not the folder's file
        model_impl=request.get("implementation", "auto"),
    )
    sampling = vllm.SamplingParams(max_tokens=request["new_tokens"], temperature=0, ignore_eos=True, detokenize=False)
    outputs = model.generate([{"prompt_token_ids": ids} for ids in request["prompts"]], sampling, use_tqdm=False)
    answer = {"version": vllm.__version__, "greedy": [list(output.outputs[0].token_ids) for output in outputs]}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()

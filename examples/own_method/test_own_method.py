"""The smallest channels go; run with pytest where the package is installed."""

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import billhook


def test_the_smallest_channels_go() -> None:
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=258)
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    wide = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    result = billhook.prune(model, tokenizer=words, method="own", ratio=0.2, multiple_of=8, quiet=True)
    kept = result.model.model.layers[0].mlp.down_proj.weight
    largest = wide.square().sum(0).topk(kept.shape[1]).indices.sort().values
    assert torch.equal(kept, wide[:, largest])

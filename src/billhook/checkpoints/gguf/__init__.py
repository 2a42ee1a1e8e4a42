"""GGUF files, read and written.

architectures  Tables of llama.cpp: its architectures, its tensor names, its names for pre-tokenizers
blocks         Codes and scales as the bytes of ggml's blocks
file           A GGUF file, or the parts of a split one, on disk: its fields, and where its tensors are
imatrix        An importance matrix, as llama-quantize reads it
lora           Low-rank adapters as a GGUF, which llama.cpp adds to the GGUF of their base
read           A GGUF as a transformers model: every field and tensor of the file is used, or refused by name
rope           A GGUF's rotary position embedding as transformers' rope_parameters, and what a GGUF says of those
tokenizer      The tokenizer of a GGUF as a transformers tokenizer
vocabulary     A tokenizer as GGUF metadata: what llama.cpp needs to cut text as the Hugging Face tokenizer does
write          Export a model in memory as one GGUF file for llama.cpp, whether its layers are equal or not
"""

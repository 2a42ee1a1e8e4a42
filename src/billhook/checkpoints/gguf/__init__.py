"""GGUF files, read and written.

architectures  What llama.cpp can hold, as data: its architectures, its tensor names, its names for pre-tokenizers
file           A GGUF file, or the parts of a split one, as it lies on the disk: its fields
read           A GGUF as a transformers model: every field and tensor of the file is used, or refused by name
rope           Rotary position embedding as a GGUF says it, in transformers' words
tokenizer      The tokenizer of a GGUF, as a transformers one: every field under `tokenizer.` is used
vocabulary     A tokenizer as GGUF metadata: what llama.cpp needs to cut text as the Hugging Face tokenizer does
write          Export: a model in memory as one GGUF file for llama.cpp, whether its layers are equal or not
"""

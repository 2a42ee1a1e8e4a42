"""Folders and files in and out: open, stream, save, verify, publish, resume.

adapter       A stock PEFT adapter as an output, beside a base that stays as it is
around        A multimodal folder: which of its tensors are the text decoder's, and all that goes along
belongings    Files of a model's folder that belong to its tokenizer or processor, which are copied along
compressed    A folder of packed integers, in the format of compressed-tensors
configs       Checks of config.json that transformers does not make
contents      Which tensors of a folder's files a model is made of
export        Carry a model to another runtime: as a GGUF file, or as a checkpoint folder
formats       What `export` is asked for
generation    generation_config.json: settings of `generate`, which are carried along
load          Load checkpoints, and refuse those that cannot be pruned before anything is computed
names         What a user may call a model, looked at before anything is opened
older         Keys that transformers 4 reads in a checkpoint, beside those that transformers 5 writes
own_code      Which code in a checkpoint folder a client may run
report        What a prune or a training did, typed for Python
result        What a prune or a training comes to, and the folder that it becomes
refused       Errors of transformers in one line: the reason, and the key of config.json behind it
resume        Layers that a prune has finished, kept in a folder as they are finished
save          Save checkpoints: a plain folder whose config says what its tensors are
shards        The safetensors files of a model folder: which are its model's, and which tensors they hold
streaming     Models without their weights, matched with the stored tensors, which may stay in their files
tensor_names  The names that the tensors of a model have on disk
tokenizers    The tokenizer of a checkpoint folder
verify        Prove that what was written comes back equal when it is loaded in this process
"""

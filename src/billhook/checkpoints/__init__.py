"""Folders and files in and out: open, stream, save, verify, publish, resume.

belongings    What lies in a model's folder and belongs to its tokenizer or processor: it goes along
configs       What config.json may say: the values that transformers' classes take as they come
contents      What the files of a folder hold of a model: one list of tensors
generation    generation_config.json: what a checkpoint asks of `generate`.  It is carried along
load          Checkpoints in: refuse what cannot be pruned before anything is computed
older         What readers of transformers 4 look for in a checkpoint, beside what transformers 5 writes
own_code      Which code that lies in a checkpoint folder a client may run
publish       A model becomes a folder: weights, report, model card and page
refused       What transformers refuses, in one line: its whole reason
resume        Layers that a prune has finished, kept in a folder as they are finished
save          Checkpoints out: a plain folder that says what its tensors are
shards        What the safetensors files of a model folder hold: whole, in a known dtype
streaming     Models before their weights: what config.json says is built, and what is stored for it found
tensor_names  What the tensors of a model that stays in its files are called there
verify        Proof that what was written comes back equal, in this process
"""

"""What long work needs: progress, memory, files, cache, locks, worker processes, weights and activations kept on disk.

activations    Hidden states of the calibration text between layers: in memory, and beyond a budget in files
ahead          Weights on their way to a device that computes with others meanwhile
atomic         Outputs appear whole or not at all: a temporary sibling, on the disk, then a rename
cache          Results kept on disk under a digest of what decides them: JSON
documents      JSON that billhook reads back: one reader, which names the file, the key and what it should be
headers        What the header of a safetensors file says, checked against the file before anything is read by it
interpreters   How another Python is started: with nothing of this process, but where it is this very one
locks          Folders that one process at a time works in: a lock on the open folder
means          What a user gives a run: where it keeps things, whom it reports to, what it may take
memory         Memory of the process: give freed memory back, and watch how much is taken
offload        Weights that are in memory only while something needs them: a model larger than memory
options        How a setting is declared: once, with its default, its help, its names and its limits
outputs        Whether an output may be written where the user wants it, before anything is computed
peers          Processes that `accelerate launch` started for one command: shares, sums, what they agree on
plug_ins       What other packages add to billhook, by the entry points that they declare
precision      What matrix products are computed in: bfloat16 where the device has instructions for it
progress       How long work tells what it is doing: a callback for progress, a clock for where the time went
quiet          What transformers prints in passing, kept off the terminal
renaming       Renames that Python's library lacks: two names exchanged in one step
run            What a run of long work reports to, keeps and shares: one value
run_folder     A folder that long work is kept in belongs to one run, and one process at a time works in it
scratch        One temporary folder for all that a process writes in passing
signals        How a command ends when a signal tells it to: at once, in one line, with nothing half-written left
special_tokens What a tokenizer adds around a text by itself: the token that begins it, the one that ends it
swap_files     Files of weights that were edited while a model stays in its files
tensor_files   Safetensors files out, tensor by tensor
text_files     Text in files: plain, or records with a field `text` (JSON by line or as one list, CSV, parquet)
units          Numbers as people write them: 100M parameters, 250MB
validation     Pydantic's refusals, in one line
workers        Work in several processes: of this machine, or of a Ray cluster
yaml_files     YAML that a user wrote: plain data, read with care
"""

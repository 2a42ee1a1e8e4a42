"""What trains: trainer, schedule, teacher, trainable parameters, early stopping.

early_stopping  When training ends before its last step: held-out text that gets worse, a loss that is not finite
fitted          The text that a pruned model has seen before it is trained, by its record
keep_zeros      Exact zeros in the linear weights of the decoder layers: what a mask method leaves
schedule        The schedule of a training run, and which of its checkpoints are whole
teacher         What the teacher says of every training window, on disk
text_windows    The windows that training reads, in which order, and those that judge it
throughput      How many tokens a second this machine trains, and answers: what a budget in minutes buys
trainables      Which parameters a recovery trains
trainer         Training on transformers' Trainer and accelerate: what billhook adds is the loss, who watches
"""

"""What trains: trainer, schedule, teacher, trainable parameters, early stopping.

adapting        Low-rank adapters that train beside gates, and become part of the weights or leave no trace
early_stopping  When training ends before its last step: held-out text that gets worse, a loss that is not finite
fitted          The text that a pruned model was calibrated on, by its record
frozen_gates    Gates that are learned with the weights frozen: which units stay, and by how much each is scaled
gating          Gates on the units of axes: a number for each, learned by gradient
keep_zeros      Exact zeros in the linear weights of the decoder layers, which training must not fill
kept_windows    The file of the training windows that a recovery kept
l0_gates        Random gates that learn beside adapters, held to the budget by multipliers
lora_gates      Gates that close one after another, by an importance from adapters' gradients
mixture         Several texts in shares that follow how far the student lags its teacher on each
moving_masks    Masks of weights that move while these train
on_levels       Weights trained on the levels of a grid, so that packing them afterwards changes no bit
ratio_gates     Gates by scores, with shares that are learned beside adapters
refinement      What a cut has left, moved towards the unpruned model by gradient, a few layers at once
schedule        The schedule of a training run, and which of its checkpoints are whole
teacher         The teacher's predictions for every training window, cached on disk
text_windows    The windows that training reads, in which order, and those that it is evaluated on
throughput      How many tokens a second this machine trains on, and a teacher predicts
trainables      Which parameters a recovery trains
trainer         Training on transformers' Trainer and accelerate, with billhook's loss, evaluations and checkpoints
window_masks    Which training windows to keep, learned while a model trains on all of them
"""

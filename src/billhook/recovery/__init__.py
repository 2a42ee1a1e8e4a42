"""Training after a cut: settings, setup, the run, candidates, forecast.

budget      What minutes buy in tokens, what of it rates and evaluations take, when to evaluate
candidates  Which layers go, judged after a short training
forecast    What minutes of training buy on this machine, and what that calls for
recover     Train a pruned model: on the unpruned model's predictions, or on text alone
selection   Which training windows a recovery keeps, learned in a training of its own
settings    The settings of a recovery, and what their values mean
student     The pruned checkpoint: what must be known of it, what is refused, the model ready to train
setup       Before a recovery trains: its texts, the teacher's predictions, and the folder that keeps them
"""

"""Training after a cut: settings, setup, the run, candidates, forecast.

candidates  Which layers go, judged after a short heal
forecast    What minutes of training buy on this machine, and what that calls for
recover     Train a pruned model back: from the unpruned model's predictions, or on text alone
settings    What a recovery may choose, and what its words mean
setup       Before a recovery trains: what it reads, what the teacher says of it
"""

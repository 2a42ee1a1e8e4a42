"""What a model is trained on after a cut: distances to the teacher's predictions and states, and the text itself.

Logits are (rows, length, vocabulary), states (rows, length, hidden); every loss is a mean over tokens, in nats where it is a
divergence: of each row, or of all.  Float32 inside, whatever comes in.
"""

import torch
from torch import Tensor

from billhook.tensors import Chosen, LogChances, Logits, Rows, States, Tail, Tokens

SMALLEST = 1e-12  # a share of probability that counts as none
LEAST_APART = 1e-6  # of 1 - cos: beneath it states count as aligned


def most_likely(logits: Logits, k: int) -> tuple[Chosen, LogChances, Tail]:
    """The teacher's `k` most likely tokens, their log-probabilities, and what is left for all the others."""
    logits = logits.float()
    top, ids = logits.topk(min(k, logits.shape[-1]), dim=-1)
    chances = top - logits.logsumexp(-1, keepdim=True)
    return ids, chances, (1 - chances.exp().sum(-1)).clamp(min=0)


def divergence(logits: Logits, ids: Chosen, chances: LogChances, tail: Tail) -> Rows:
    """Of each row KL(teacher || student) where both count all tokens but the teacher's `ids` as one.

        sum_k p_k (log p_k - log q_k) + p_tail (log p_tail - log q_tail)

    A lower bound of the whole divergence, and equal to it where `ids` are the vocabulary.  The probabilities of `ids`, which
    were rounded when they were stored, are scaled to sum to 1 - tail.
    """
    logits, chances = logits.float(), chances.float()
    p = chances.exp()
    p = p * ((1 - tail) / p.sum(-1)).unsqueeze(-1)
    log_q = logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)
    rest = (1 - log_q.exp().sum(-1)).clamp(min=SMALLEST)
    known = (p * (p.clamp(min=SMALLEST).log() - log_q)).sum(-1)
    return (known + tail * (tail.clamp(min=SMALLEST) / rest).log()).mean(-1)


def next_token(logits: Logits, tokens: Tokens) -> Tensor:
    """Cross-entropy of every token but a row's first, given those before it."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten())


def misalignment(states: States, wanted: States) -> Rows:
    """Of each row the mean of 1 - cos between states: a norm between them and what reads them would scale away all else."""
    return (1 - torch.cosine_similarity(states.float(), wanted.float(), dim=-1)).mean(-1)


def beside(distance: Rows, apart: Rows) -> Tensor:
    """Has what is `apart` pull as hard as `distance`, whatever its own scale (Minitron, arXiv:2407.14679, section 3).

    The value is the mean of `distance` alone.  Its gradient is that and, row by row, `apart`'s as a share of `distance`: rows
    weigh the same whatever others a forward pass holds beside them.
    """
    pull = distance.detach() / apart.detach().clamp(min=LEAST_APART) * apart
    return (distance + pull - pull.detach()).mean()

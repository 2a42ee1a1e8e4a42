"""Losses of training after a cut: distances to the teacher's predictions and states, and the text itself.

Logits are (rows, length, vocabulary), states (rows, length, hidden).  Every loss is a mean over tokens, of each row or
of all; divergences are in nats.  All are computed in float32.
"""

import torch
from torch import Tensor

from billhook.tensors import Chosen, LogChances, Logits, Rows, States, Tail, Tokens

SMALLEST = 1e-12  # lower bound of probabilities whose logarithm is taken
LEAST_APART = 1e-6  # lower bound of 1 - cos; states below it count as aligned


def most_likely(logits: Logits, k: int) -> tuple[Chosen, LogChances, Tail]:
    """The teacher's `k` most likely tokens, their log-probabilities, and the probability of all others together."""
    logits = logits.float()
    top, ids = logits.topk(min(k, logits.shape[-1]), dim=-1)
    chances = top - logits.logsumexp(-1, keepdim=True)
    return ids, chances, (1 - chances.exp().sum(-1)).clamp(min=0)


def divergence(logits: Logits, ids: Chosen, chances: LogChances, tail: Tail) -> Rows:
    """KL(teacher || student) of each row, with all tokens but the teacher's `ids` counted as one.

        sum_k p_k (log p_k - log q_k) + p_tail (log p_tail - log q_tail)

    A lower bound of the whole divergence, equal to it if `ids` are the whole vocabulary.  The probabilities of `ids`,
    rounded when they were stored, are scaled to sum to 1 - tail.
    """
    logits, chances = logits.float(), chances.float()
    p = chances.exp()
    p = p * ((1 - tail) / p.sum(-1)).unsqueeze(-1)
    log_q = logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)
    student_tail = (1 - log_q.exp().sum(-1)).clamp(min=SMALLEST)
    of_ids = (p * (p.clamp(min=SMALLEST).log() - log_q)).sum(-1)
    return (of_ids + tail * (tail.clamp(min=SMALLEST) / student_tail).log()).mean(-1)


def next_token(logits: Logits, tokens: Tokens) -> Tensor:
    """Cross-entropy of every token but a row's first, given those before it."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten())


def misalignment(states: States, wanted: States) -> Rows:
    """Mean of 1 - cos between states, of each row: only directions count, since the next norm removes scales."""
    return (1 - torch.cosine_similarity(states.float(), wanted.float(), dim=-1)).mean(-1)


def beside(distance: Rows, apart: Rows) -> Tensor:
    """Add the loss `apart` to `distance` with equal weight, whatever its scale (Minitron, arXiv:2407.14679, section 3).

    The value is the mean of `distance` alone.  The gradient also has that of `apart`, scaled row by row to the size of
    `distance`, so that a row's weight does not depend on the other rows of its forward pass.
    """
    pull = distance.detach() / apart.detach().clamp(min=LEAST_APART) * apart
    return (distance + pull - pull.detach()).mean()

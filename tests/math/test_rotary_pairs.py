"""What a rotary pair is worth: its energy on the text, which no turn changes."""

import torch

from billhook.math import rotary_pairs
from billhook.math.low_rank import block_sums


def test_scores_are_energies_of_what_comes_out() -> None:
    torch.manual_seed(0)
    X, W, b = torch.randn(50, 6).double(), torch.randn(4 * 8, 6).double(), torch.randn(4 * 8).double()
    K = torch.randn(2 * 8, 6).double()
    sums = block_sums(X.T @ X, X.sum(0), len(X))
    q, k = (X @ W.T + b).view(50, 4, 8), (X @ K.T).view(50, 2, 8)
    of_q, of_k = rotary_pairs.energies(W, b, sums, 4), rotary_pairs.energies(K, None, sums, 2)
    assert torch.allclose(of_q, q.square().sum(0)) and torch.allclose(of_k, k.square().sum(0))
    scores = rotary_pairs.pair_scores(of_q, of_k)
    for head in range(2):
        for pair in range(4):
            channels = [pair, pair + 4]
            shared = q[:, 2 * head : 2 * head + 2, channels].square().sum() * k[:, head, channels].square().sum()
            assert torch.isclose(scores[head, pair], shared)


def test_the_best_pairs_stay_and_those_in_common_weigh_every_head_alike() -> None:
    scores = [
        torch.tensor([[1.0, 3.0, 2.0], [0.0, 5.0, 6.0]]).double(),
        torch.tensor([[900.0, 0, 100], [8, 1, 1]]).double(),
    ]
    assert rotary_pairs.best(scores[0], 2) == ((1, 2), (1, 2)) and rotary_pairs.best(scores[1], 1) == ((0,), (0,))
    common = rotary_pairs.in_common(scores)
    assert torch.allclose(common.sum(1), torch.ones(2).double())
    assert torch.allclose(
        common[0], torch.tensor([1 / 6 + 0.9 + 0.8, 0.5 + 5 / 11 + 0.1, 2 / 6 + 6 / 11 + 0.2]).double() / 4
    )

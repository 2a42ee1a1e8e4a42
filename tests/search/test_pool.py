"""Which windows a search may draw from."""

import pytest
import tiny
import torch

from billhook.data import Text
from billhook.errors import BillhookError
from billhook.math import overlap
from billhook.search import pool

TEXTS = [Text("one", tiny.text(900)), Text("other", tiny.text(1400)[2000:].upper())]


def drawn(count: int = 20, clusters: int = 3, seed: int = 0) -> pool.Pool:
    embedding = torch.randn(258, 16, generator=torch.Generator().manual_seed(5))
    return pool.draw(TEXTS, tiny.tokenizer(), embedding, count, 32, clusters, seed)


def test_every_text_gives_its_share_and_every_window_has_a_cluster() -> None:
    found = drawn(count=21)
    assert found.source.count(0) == 11 and found.source.count(1) == 10 and found.sources == ("one", "other")
    assert found.tokens.shape == (21, 32) and len(found.clusters) == 21
    sizes = found.clusters.bincount().tolist()
    assert sizes == sorted(sizes, reverse=True) and all(sizes)


def test_a_seed_gives_the_same_pool_and_another_one_another() -> None:
    assert torch.equal(drawn().tokens, drawn().tokens) and torch.equal(drawn().clusters, drawn().clusters)
    assert not torch.equal(drawn().tokens, drawn(seed=1).tokens)


def test_windows_that_differ_in_their_letters_are_apart() -> None:
    found = drawn(clusters=2)
    assert len(set(zip(found.source, found.clusters.tolist(), strict=True))) == 2


def test_windows_of_usual_tokens_and_repeated_ones_are_left_out() -> None:
    draw = torch.Generator().manual_seed(0)
    telling = torch.randint(100, (18, 8), generator=draw)
    dull = torch.full((2, 8), 200) + torch.tensor([[0], [1]])
    every = torch.cat([telling, dull, telling[:3]])
    kept = pool.informative(every)
    assert len(kept) == 18 and not any((row >= 200).all() for row in kept)


def test_overlap_is_seen_at_any_offset() -> None:
    text = torch.randint(50_000, (4096,), generator=torch.Generator().manual_seed(1))
    own, far = text[:2048].view(-1, 128), text[2048:].view(-1, 128)
    assert not overlap.overlapping(far, own).any()
    shifted = torch.cat([far[:3], text[777 : 777 + 256].view(-1, 128)])
    assert overlap.overlapping(shifted, own).tolist() == [False] * 3 + [True] * 2


def test_too_few_windows_are_said() -> None:
    with pytest.raises(BillhookError, match=r"text 'one' has \d+ windows of 32 tokens for the pool, fewer than 500"):
        drawn(count=1000)

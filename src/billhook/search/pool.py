"""The pool that a search for calibration samples draws from: short windows of several texts, sorted by what they are about."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from billhook import data
from billhook.data import Text
from billhook.errors import BillhookError
from billhook.tensors import Clusters, Tokens, precise

UNINFORMATIVE = 0.1  # share of each text's windows that are left out: those whose tokens are the most usual ones


@dataclass(frozen=True)
class Pool:
    """Windows, where each comes from, and which cluster it belongs to."""

    tokens: Tokens
    sources: tuple[str, ...]  # of the texts
    source: tuple[int, ...]  # of each window, by number
    clusters: Clusters
    left_out: int  # windows of little information, and repeated ones
    begins_with: tuple[str, ...]  # special tokens at the start of each


def draw(
    texts: Sequence[Text], tokenizer: object, embedding: Tensor, count: int, length: int, clusters: int, seed: int
) -> Pool:
    """`count` windows, as many of each text as of any other, in `clusters` groups by their mean embedding.

    AdaPruner filters out samples of low information; how is not public.  Here a window's information is the mean of -log2 of
    its tokens' frequency in its own text, and the lowest tenth goes, with every repeated window.

    Raises:
        BillhookError: a text has too few windows.
    """
    parts, source, left_out, begins_with = [], [], 0, ()
    for n, text in enumerate(texts):
        wanted = count // len(texts) + (n < count % len(texts))
        every = data.windows(text, tokenizer, length)
        telling = informative(every.tokens, len(every.begins_with))
        left_out += len(every.tokens) - len(telling)
        begins_with = every.begins_with
        if len(telling) < wanted:
            raise BillhookError(
                f"text {text.name!r} has {len(telling)} windows of {length} tokens for the pool, fewer than {wanted}: use more text, or "
                "a smaller --pool"
            )
        order = torch.randperm(len(telling), generator=torch.Generator().manual_seed(seed))
        parts.append(telling[order[:wanted]])
        source += [n] * wanted
    tokens = torch.cat(parts)
    groups = grouped(tokens, embedding, clusters, seed)
    return Pool(tokens, tuple(text.name for text in texts), tuple(source), groups, left_out, begins_with)


def informative(windows: Tokens, leading: int = 0) -> Tensor:
    """The windows, each once, without those that say the least; the first `leading` tokens of each, the same in all, say nothing."""
    _, first = np.unique(windows.numpy(), axis=0, return_index=True)
    windows = windows[np.sort(first)]
    text = windows[:, leading:]
    counts = torch.bincount(text.flatten()).double()
    bits = -(counts / counts.sum()).log2()[text].mean(1)
    return windows[bits.argsort(stable=True)[int(UNINFORMATIVE * len(windows)) :].sort().values]


def grouped(windows: Tokens, embedding: Tensor, clusters: int, seed: int) -> Clusters:
    """k-means of the windows' mean embeddings, centred; clusters are numbered by size, and may turn out fewer."""
    means = precise(embedding[windows.to(embedding.device)]).mean(1).cpu()
    clusters = min(clusters, len(windows))
    _, found = kmeans2((means - means.mean(0)).numpy(), clusters, minit="++", rng=np.random.default_rng(seed))
    sizes = np.bincount(found, minlength=clusters)
    rank = {int(old): new for new, old in enumerate(np.argsort(-sizes, kind="stable"))}
    return torch.tensor([rank[int(one)] for one in found])

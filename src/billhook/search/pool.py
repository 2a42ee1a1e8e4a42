"""The pool that a search for calibration samples draws from: short windows of several texts, clustered by topic."""

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

UNINFORMATIVE = 0.1  # share of each text's windows that are left out: those whose tokens are the most frequent ones


@dataclass(frozen=True)
class Pool:
    """Windows, where each comes from, and which cluster it belongs to."""

    tokens: Tokens
    sources: tuple[str, ...]  # names of the texts
    source: tuple[int, ...]  # the number of each window's text
    clusters: Clusters
    left_out: int  # how many windows were left out: uninformative or repeated ones
    begins_with: tuple[str, ...]  # special tokens at the start of each window


def draw(
    texts: Sequence[Text], tokenizer: object, embedding: Tensor, count: int, length: int, clusters: int, seed: int
) -> Pool:
    """`count` windows, equally many of each text, in `clusters` clusters by their mean embedding.

    AdaPruner filters out samples of low information; its rule is not public.  Here a window's information is the mean
    of -log2 of its tokens' frequency in its text.  The lowest tenth of the windows is left out, and every repeated
    window.

    Raises:
        BillhookError: a text has too few windows.
    """
    parts, source, left_out, begins_with = [], [], 0, ()
    for n, text in enumerate(texts):
        wanted = count // len(texts) + (n < count % len(texts))
        windows = data.windows(text, tokenizer, length)
        candidates = informative(windows.tokens, len(windows.begins_with))
        left_out += len(windows.tokens) - len(candidates)
        begins_with = windows.begins_with
        if len(candidates) < wanted:
            raise BillhookError(
                f"text {text.name!r} has {len(candidates)} windows of {length} tokens for the pool, fewer than "
                f"{wanted}: "
                "use more text, or a smaller --pool"
            )
        order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
        parts.append(candidates[order[:wanted]])
        source += [n] * wanted
    tokens = torch.cat(parts)
    cluster_of = clustered(tokens, embedding, clusters, seed)
    return Pool(tokens, tuple(text.name for text in texts), tuple(source), cluster_of, left_out, begins_with)


def informative(windows: Tokens, leading: int = 0) -> Tensor:
    """The distinct windows without the least informative tenth.

    Args:
        leading: number of special tokens at the start of every window, which do not count.
    """
    _, first = np.unique(windows.numpy(), axis=0, return_index=True)
    windows = windows[np.sort(first)]
    text = windows[:, leading:]
    counts = torch.bincount(text.flatten()).double()
    bits = -(counts / counts.sum()).log2()[text].mean(1)
    return windows[bits.argsort(stable=True)[int(UNINFORMATIVE * len(windows)) :].sort().values]


def clustered(windows: Tokens, embedding: Tensor, clusters: int, seed: int) -> Clusters:
    """The cluster of each window, by k-means of the centred mean embeddings.

    Clusters are numbered by size, the largest first; there may be fewer than asked for.
    """
    means = precise(embedding[windows.to(embedding.device)]).mean(1).cpu()
    clusters = min(clusters, len(windows))
    _, labels = kmeans2((means - means.mean(0)).numpy(), clusters, minit="++", rng=np.random.default_rng(seed))
    sizes = np.bincount(labels, minlength=clusters)
    rank = {int(old): new for new, old in enumerate(np.argsort(-sizes, kind="stable"))}
    return torch.tensor([rank[int(label)] for label in labels])

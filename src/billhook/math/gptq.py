"""GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (Frantar et al. 2022,
arXiv:2210.17323).

With H and U as in `billhook.math.sparsegpt`, H = G + delta I, H^-1 = U^T U.  From left to right:
1. Scale        at the first column of a block of the grid: its scale, from the weights as they are by now.
2. Sweep        column j goes to the nearest levels q, and its error e = (w - q) / U_jj to the columns right of it:
                W_:,k -= e U_jk, at once within a stretch of columns, at its end for the rest.
Should the sweep end further off than round-to-nearest, as it can where damping is next to none, that is the answer.

Where this differs from the published code.  A scale is the best of sixteen by the squared error of the block, each
column's counted by G_jj.  Entries that have to stay zero are zero, and their error goes to the right like any other.
A target of its own is met as SparseGPT meets it.
"""

import torch

from billhook.math import grids, sparsegpt
from billhook.math.grids import Grid, Quantised
from billhook.math.layerwise import Settings, Target, dead, nearer
from billhook.math.sparsity import Support
from billhook.tensors import Columns, Gram, Weight


def quantise(W: Weight, target: Target, grid: Grid, settings: Settings) -> tuple[Quantised, float]:
    """The codes and scales of a weight, and the damping that was needed.  Reads of the settings: damping, zeros, block.

    Raises:
        BillhookError: as `sparsegpt.inverse_factor` and `grids.scales_of`.
    """
    plain = grids.nearest(W, grid, settings.zeros)
    idle = dead(target)
    gram = target.gram + torch.diag(idle.to(target.gram.dtype))
    U, used = sparsegpt.inverse_factor(gram, settings.damping)
    moved = sparsegpt.moved(W, target, U)
    # a dead input costs nothing, and its weights stay near what they were, whatever other text brings
    swept = sweep(moved.float(), U.float(), gram.diagonal().float(), grid, settings)
    return (swept if nearer(swept.values(), plain.values(), W, target) else plain), used


def sweep(W: Weight, U: Gram, energies: Columns, grid: Grid, settings: Settings) -> Quantised:
    """The weight after step 2 over all columns.

    Args:
        energies: G_jj of each column.
    """
    columns = W.shape[1]
    V = W.T.contiguous()  # columns lie together, as the sweep reads them
    forced: Support | None = None if settings.zeros is None else settings.zeros.T
    codes, scales, minima = torch.empty_like(V), [], []
    width = max(settings.block // grid.block, 1) * grid.block
    for start in range(0, columns, width):
        end = min(start + width, columns)
        errors = torch.empty_like(V[start:end])
        for first in range(start, end, grid.block):
            part = slice(first, first + grid.block)
            scale, minimum = grids.best_scales(V[part].T, grid, energies[part])
            low = None if minimum is None else minimum.float()
            scales.append(scale)
            minima += [] if minimum is None else [minimum]
            for j in range(first, first + grid.block):
                q = grids.codes_of(V[j], scale, low, grid)
                if forced is not None:
                    q = q.masked_fill(forced[j], 0.0)
                codes[j] = q
                e = (V[j] - grids.values_of(q, scale, low)) / U[j, j]
                V[j:end].addr_(U[j, j:end], e, alpha=-1)
                errors[j - start] = e
        V[end:].addmm_(U[start:end, end:].T, errors, alpha=-1)
    every = torch.stack(minima, 1) if minima else None
    return Quantised(grid, codes.T.to(torch.int8).contiguous(), torch.stack(scales, 1), every)

"""Types of tensors by shape.  Names of dimensions bind within one signature; the tests check every call."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Weight = Float[Tensor, "out in"]  # weight that reads an axis, seen as (out, in) whatever its storage order
Narrowed = Float[Tensor, "out kept"]  # the same weight with only the kept columns
Writer = Float[Tensor, "in inputs"]  # weight that writes an axis, a row for each column of its reader
DownAdapter = Float[Tensor, "rank in"]  # the factor of a low-rank adapter that reads a weight's input
UpAdapter = Float[Tensor, "out rank"]  # the other one
Moment = Float[Tensor, "inputs inputs"]  # X^T X of a writer's input X, or a multiple of it, float64
AttentionMaps = Float[Tensor, "blocks each rows keys"]  # chances that sum to 1 over the keys
Pairs = Float[Tensor, "blocks each each"]  # one number for every two units of a block
ValueMoments = Float[Tensor, "heads channels channels"]  # of what a KV head's query heads put out, or of what reads it
ValueTurn = Float[Tensor, "channels channels"]  # what turns a KV head's values, or turns them back, float64
ChannelEnergies = Float[Tensor, "heads channels"]  # of what each channel of each head holds, float64
KeyEnergies = Float[Tensor, "kv_heads channels"]
PairScores = Float[Tensor, "kv_heads pairs"]  # one number for each rotary pair of a KV head, float64
Expand = Float[Tensor, "out rank"]  # factors of a weight, W = expand reduce
Reduce = Float[Tensor, "rank in"]
Bias = Float[Tensor, " out"]
InputSum = Float[Tensor, " in"]  # sum of the rows of a weight's input X, float64
Stacked = Float[Tensor, "all all"]  # moments of all query heads of a KV head, one behind another, or of what reads them
ValueRows = Float[Tensor, "kept channels"]  # the first rows of a ValueTurn
Gram = Float[Tensor, "in in"]  # X^T X of a reader's input X, float64
Cross = Float[Tensor, "out in"]  # E^T X: correlation of a target E with a reader's input X, float64
Columns = Float[Tensor, " in"]  # one number for each column of a reader
Scores = Float[Tensor, " units"]  # one number for each unit of an axis
Units = Int[Tensor, " chosen"]  # numbers of units, ascending
Kept = Int[Tensor, " kept"]  # numbers of the units, or columns, that stay, ascending
Index = Int[Tensor, "units span"]  # which entries of a dimension each unit owns
Mask = Bool[Tensor, " entries"]
Tokens = Int[Tensor, "windows length"]  # token ids; every row is a full window
Probes = Int[Tensor, "probes length"]  # other windows, for losses
Logits = Float[Tensor, "rows length vocabulary"]
Chosen = Int[Tensor, "rows predicted k"]  # ids of the teacher's most likely tokens, the most likely first
LogChances = Float[Tensor, "rows predicted k"]  # their log-probabilities
Tail = Float[Tensor, "rows predicted"]  # probability of all other tokens together
Values = Float[Tensor, " tokens"]  # one number for each token
Rows = Float[Tensor, " rows"]  # one number for each window of a forward pass
States = Float[Tensor, "rows length hidden"]
SlotWindows = Float[Tensor, "slots windows units"]  # a number for each slot of an axis, window and unit
SlotMixtures = Float[Tensor, "mixtures slots units"]  # a number for each mixture of clusters of windows, slot and unit
WindowUnits = Float[Tensor, "windows units"]
SlotUnits = Float[Tensor, "slots units"]
Clusters = Int[Tensor, " windows"]  # which cluster each window belongs to, from 0
Shares = Float[Tensor, " windows"]  # what each window weighs in a mixture, summing to 1
TextOf = Int[Tensor, " windows"]  # which text each window is of, from 0
TextShares = Float[Tensor, " texts"]  # the share of each text in training, summing to 1, float64
Excess = Float[Tensor, " texts"]  # a loss of each text above a reference, float64
Masks = Float[Tensor, " windows"]  # of training windows: what says which of them stay, float64
Losses = Float[Tensor, " windows"]
Chances = Float[Tensor, " units"]  # the chance of each unit to stay, float64
LevelShares = Float[Tensor, " levels"]  # of its units that each level keeps, float64
Places = Int[Tensor, " units"]  # the layer, or the group, that each unit belongs to
Drawn = Float[Tensor, "masks units"]  # masks of units: 1 where one stays
MaskLosses = Float[Tensor, " masks"]
RotaryPairs = tuple[tuple[int, ...], ...]  # numbers of rotary pairs that stay, ascending, of each KV head
WITHOUT_FLOAT64 = {"mps"}  # types of devices that have no float64


def float64_device(device: torch.device) -> torch.device:
    """The device for float64 arithmetic on a device's tensors: itself, or the CPU."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def precise(tensor: Tensor) -> Tensor:
    """The tensor in float64, on the `float64_device` of its device."""
    return tensor.to(float64_device(tensor.device)).double()  # moved first: an Apple GPU cannot convert to float64

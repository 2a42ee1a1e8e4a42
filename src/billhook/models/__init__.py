"""The structure of models: families, axes, surgery, layouts, experts. Knows no mathematics.

axes                Named axes: one coupled group of parameters, wherever it lives
cached              Forward passes that go on from another by its cache of keys and values
derive              A family's row derived from a model itself
experts             A mixture of experts as modules, each with linear weights of its own
families            What a model's family says about it: its axes, its linear modules, its sizes
flags               What config.json asks of every forward: to put out more, or other types
given               A row that the user gives for a model type without one
greedy              Plain greedy text: the likeliest token each time
layout              How sizes are written down: `uniform` is a stock config, `per_layer` one whose layers differ
limits              How much of each axis a model can give up, and what its stock class can hold
modeling_per_layer  Model families as data, and causal LMs whose layers differ in size
modes               What a model does in training alone: how it is kept out of a measurement
multimodal          Multimodal models whose text decoder is pruned where it stands
patterns            Config keys that say what each decoder layer is
places              Where the parts of a decoder are that a derived row names
plan                What a prune will cut: units of every axis of every layer, whole layers
proof               Proof of a derived row, on a small random model of the same config class
residual            The residual dimension: every slot of it in a model, and cutting them all to the same channels
rotary              Heads of fewer channels: pairs of query and key channels that rotary positions turn together
rotation            Turning the residual stream, which changes nothing
shrink              A small config of the same class: the sizes shrunk, the structure kept
sizes               What a model weighs, in parameters and bytes
stock_families      Families whose layers cannot differ: mixtures of experts, and hybrids
stock_shapes        Shapes that only the per_layer layout holds, made a stock class's again
surgery             Cutting: remove units or layers for good, or silence units in place
vocabulary          Vocabulary pruning: keep the tokens that a text needs, and cut tokenizer
"""

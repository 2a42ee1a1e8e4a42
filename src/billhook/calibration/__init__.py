"""A model run layer by layer over calibration text: Gram matrices, gradients, routers, layer importance.

attention_maps    How alike the attention maps of a layer's heads are, while it runs
forward           The parts of a forward pass: into the first layer, through the head
gradients         Sums of weight times gradient for every unit of every axis: one backward pass for each window
gram              Gram matrices of what enters a matrix: summed block by block, one triangle of them
inputs            Run a model layer by layer and keep sums and means of what enters linear weights
layer_importance  Which layers go, by what they do: their influence on the hidden state, or the loss without them
linears           Run a model layer by layer and keep sums of what enters every linear weight of a decoder layer
nearness          How near the predictions of cut models are to the unpruned one's, window by window
passage           A text on its way through a model, layer by layer: what all walks share
routers           What the routers of a mixture of experts do on a text, layer by layer
walk              Run a model layer by layer and keep sums of what enters the readers of its axes
"""

"""What methods do to a model, in place: axes narrowed, layers or experts gone, the stream cut, weights set to zero.

approximating    Modules are refitted to what they put out, then units of their axes go (Greedy Output Approximation)
chopping         Whole layers go, and what stands before each cut may make up for them (LayerChop)
experts          Fewer experts in every layer of a mixture: dropped or merged (REAP, UNCURL)
low_rank         Linear weights become two thin ones each (LLM-ROM, Bolaco)
masking          Zeros in the linear weights of the decoder layers, found operator by operator
narrowing        Units of an axis go, and what reads them is refitted (FASP)
parallel         Layers cut in several processes, where none of them sees what became of another
quantizing      Few bits for the linear weights of the decoder layers, operator by operator
restoration      How far a reader's new weight is from what it should put out
rotary_pairs     Queries and keys lose rotary pairs: what each pair is worth
settings         What may be chosen of each cut
slicing          Channels of the residual stream go, through the whole model (SliceGPT)
slicing_restore  What a narrower residual stream lost, made up for in closed form
values           Values turned to their principal axes, before any goes
"""

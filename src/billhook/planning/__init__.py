"""From a recipe to a plan.

ablation         what a model loses without each of its modules
ablation_plan    from such a table to a plan: widths, then whole layers
allocation       how the budget is spread over the layers, as the user says it
axis_plan        units of axes, by the allocation
bits             bits by layer under a budget of bytes
budget           the plan that meets a budget: parameters, bytes, speed
command          the command line that makes a result again
few_bits         what quantize is asked for
gated_plan       units of axes by gates that were learned
kv_plan          widths of value heads, and of key heads with them, by a budget
latency          how long a layer takes at candidate sizes, on this machine
layer_plan       whole layers
method           what a method is, and the phases of a prune
ordered_plan     units of axes and layers by one order of all
plan_lines       one line that says what will go
planners         from parameters to save to units of axes
rank_plan        ranks of linear weights that become two thin ones
recipe           a recipe and its parts
residual_budget  channels of the residual stream
sensitivity      what cutting one layer costs the model
texts            the windows that a prune looks at
"""

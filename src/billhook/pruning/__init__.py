"""From a recipe to a plan, a cut model and its result; dry run, comparison, sweep.

allocation       How the budget is spread over the layers, as the user says it
budget           From a goal (parameters, bytes, speed) to the ratio that reaches it
carry_out        What cuts a model by a plan, by the name of its method
compare          Many prunes of one model, judged by the same texts: methods at one size, or one method at many
contenders       What is compared: a method with settings, as one word of a command says it
depth_or_width   Allocation `auto`: fewer layers or narrower ones, whichever does less harm
dry_run          What a prune will come to, before it: parameters, memory, disk, operations and time
latency          How long a decoder layer takes at candidate sizes, on this machine
layer_plan       Which whole layers go: those that the recipe names, or as many as its budget asks for
method_settings  The settings of each method, taken from a recipe
plan_lines       One line that says, before the work, what will go
planners         From a number of parameters to save to a plan: which layers give how much, by an allocation
planning         From a recipe to a plan: gather what the allocation needs to know, then solve it for the budget
preflight        What cannot be done by the means that a prune was given, said before it computes anything
prune            Prune a model by a recipe, and prove what was written
recipe           One recipe says a whole pruning run: command-line flags
recipe_file      A recipe on disk: the model, the settings, and the numbers it is expected to give
rehearsal        What a layer of a model costs to prune on this machine: the prune itself
residual_budget  How many channels of the residual stream a budget takes, and what a plan of them says
result           What a prune comes to: a model, its tokenizer and a report, and the folder that they become
sensitivity      What cutting one layer costs the model: the divergence from its own dense predictions
solve            The plan that meets a budget: a share of parameters, a number of them, bytes, or speed
texts            The windows that a prune looks at: to calibrate, and to judge by
"""

"""What a model is worth: perplexity, speed, memory, zero-shot tasks, continuations.

continuations  What a model writes by itself
expected       The numbers that a recipe file may expect of its result
look           A short look at a model before and after it is changed
perplexity     How well a model predicts text: perplexity, and beside a reference what perplexity hides
side_by_side   What models cost and what they are worth, side by side: quality, speed, memory
speed          How fast a model is and what memory it takes, several models in turns
zeroshot       Zero-shot accuracy through lm-eval: its tasks, its prompts and its scoring
"""

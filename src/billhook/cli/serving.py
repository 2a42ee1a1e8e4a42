"""Commands that carry a result to where it is served: check, export."""

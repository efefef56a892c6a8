"""Planning: what a run will cost in memory, from the recipe's own step on fake tensors."""

"""Writing models whose weights are codes."""

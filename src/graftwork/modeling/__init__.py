"""Models, their sites, and the state of one forward pass."""

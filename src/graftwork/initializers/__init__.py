"""Initializers: where an adapter starts, from weights, activations or gradients. base.py has the contract."""

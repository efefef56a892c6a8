"""Evaluation: loss and perplexity, exact match, batched over many adapters."""

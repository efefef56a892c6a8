"""Grafts in the formats of other tools: PEFT (read and written), vLLM, merged models, GGUF, mlx."""

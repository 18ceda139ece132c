"""Which type each tensor of a model should have: how much an error in each of its weights changes what it says.

Measures on checkpoints, recipes and GGUF files by the convert half's own arithmetic, and never loads llama.cpp.
"""

"""Quantization of weights: file types and their mixes, importance matrices, and the kernels.

Uses GGUF tensor names and ggml's types. Knows neither Hugging Face's names nor where a tensor came from.
"""

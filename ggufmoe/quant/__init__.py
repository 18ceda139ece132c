"""From weights to quantized bytes: file types and mixes, importance matrices, and the kernels.

Knows GGUF tensor names and ggml's types; it knows neither Hugging Face's names nor where a tensor came from.
"""

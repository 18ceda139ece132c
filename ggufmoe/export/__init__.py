"""Plans GGUF files: names, metadata, tokenizer and layout of the files that a model of any source becomes."""

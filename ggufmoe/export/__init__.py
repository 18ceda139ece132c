"""From a model source to the bytes of a GGUF file: names and layout, tokenizer, plan and writer."""

"""What a model is measured by: perplexity, divergence, importance matrices, speed."""

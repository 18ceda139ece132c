"""Reaches models on the Hugging Face Hub: their names, their files, and ranges of files that are not stored."""

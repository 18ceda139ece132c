"""What a GGUF file says: types, header, manifest. Needs no engine; trusts nothing that it reads."""

"""What a GGUF file says: types, header, hyper-parameters, names, rows, manifest. Needs no engine."""

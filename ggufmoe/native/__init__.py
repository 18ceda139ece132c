"""llama.cpp's libraries through ctypes: declarations, limits, and the log lines that this package relies on."""

"""llama.cpp's libraries through ctypes: declarations, devices, quantizers, graphs, and the wording of its log."""

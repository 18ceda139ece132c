"""Where the parts of a model go: their sizes, the devices, the plan, and libllama's report of a load."""

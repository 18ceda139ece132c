"""What goes where: how large a model's parts are, which devices there are, the plan, and libllama's report."""

"""One tensor of a model, read by rows: its dtype, its interface, and rows in another order or computed from others."""

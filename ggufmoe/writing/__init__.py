"""Writes planned files: the plan, the tiles it is cut into, the writer, its journal, and the place of the output."""

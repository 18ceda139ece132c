"""The best file of a model: its size found from memory or from a divergence, and the file measured before it is kept.

The one room that uses both halves for making a file: what was written by the convert half is measured by the run half.
"""

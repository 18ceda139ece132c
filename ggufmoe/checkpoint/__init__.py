"""Hugging Face checkpoints: opened, checked as a whole, and read by rows."""

from ggufmoe.checkpoint.opening import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]

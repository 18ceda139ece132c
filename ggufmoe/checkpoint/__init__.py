"""Opens Hugging Face checkpoints, checks that they are complete, and reads their tensors by rows."""

from ggufmoe.checkpoint.opening import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]

"""What is in model files: inspect, diff, experts. Nothing here loads a model."""

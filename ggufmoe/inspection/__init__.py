"""What is in model files: inspect, diff, experts. Needs no engine."""

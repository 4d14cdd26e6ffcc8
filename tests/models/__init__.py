"""Models, encoders and checkpoints."""

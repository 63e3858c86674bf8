"""What held-out pairs and texts say of a model."""

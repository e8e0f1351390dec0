"""What a model costs under encryption."""

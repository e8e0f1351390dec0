"""Stock models -> this family, and back."""

"""Recipe -> Trainer -> finished run."""

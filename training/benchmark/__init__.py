"""What training, measuring, generating and starting cost beside stock models."""

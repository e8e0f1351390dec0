"""Finished runs -> folders for the Hub, checked, published and loaded back."""

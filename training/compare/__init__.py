"""Finished runs -> tables, statistics over seeds, and a page."""

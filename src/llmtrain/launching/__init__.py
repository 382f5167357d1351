"""Starts runs on other machines."""

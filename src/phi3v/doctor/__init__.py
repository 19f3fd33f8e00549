"""Checks of a recipe before it is trained."""

"""Asking a model: the chat page and one answer in the terminal."""

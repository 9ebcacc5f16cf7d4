"""Extractive question answering over contexts longer than the model: windows, features, answers."""

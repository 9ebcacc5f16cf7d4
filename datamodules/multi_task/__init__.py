"""Rows of several tasks in one order, an optimizer step at a time."""

"""Encoding rows as token ids with a prompt or chat template, and marking the tokens to learn."""

"""Rows as token ids, in a model's template, with what is to be learned of them."""

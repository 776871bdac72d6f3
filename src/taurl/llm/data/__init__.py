"""Data: files and rows, chat templates, and what becomes of both as token ids."""

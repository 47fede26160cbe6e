"""Conversations as training text: rows of messages, chat templates, and which characters train."""

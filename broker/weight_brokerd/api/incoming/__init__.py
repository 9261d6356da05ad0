"""Requests on their way in: who sends, how much, in which steps."""

"""The datasystem around the cards: the worker that the broker runs, the secrets of its clients, host objects."""

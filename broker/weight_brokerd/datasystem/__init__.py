"""The datasystem around the cards: the worker that the broker runs, and the secrets of its clients."""

"""How processes behave: what they take, how fast they ask, and what they claim of others."""

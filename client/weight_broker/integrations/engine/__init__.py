"""What the loaders of inference engines have in common: when weights may be taken from a peer, and when they may be
published. Each engine has a package beside this one with what is its own (`weight_broker.integrations.engine.engine`).
"""

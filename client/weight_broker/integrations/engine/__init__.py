"""The common part of the loaders of inference engines: when weights may come from a peer, and when they may be
published. Each engine has a package beside this one with its `Engine` (`weight_broker.integrations.engine.engine`)."""

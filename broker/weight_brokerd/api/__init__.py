"""The gRPC services: validate, identify, decide (core), act, respond."""

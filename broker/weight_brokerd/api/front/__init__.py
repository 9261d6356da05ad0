"""The gRPC socket's front: it knows whose each connection is, which gRPC in Python does not say."""

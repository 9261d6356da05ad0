"""Generated from proto/weight_broker/v1 by `make generate`; do not edit."""

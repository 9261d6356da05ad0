"""What operators see: log, audit events, metrics."""

"""The operator's command line: `weight-broker`."""

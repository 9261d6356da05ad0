"""Who holds what, cluster-wide."""

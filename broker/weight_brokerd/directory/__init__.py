"""Who may load from disk, cluster-wide."""

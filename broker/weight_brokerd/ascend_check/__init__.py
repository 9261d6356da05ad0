"""ascend_check."""

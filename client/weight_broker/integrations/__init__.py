"""Adapters: one file per loader that fills its tensors through the broker."""

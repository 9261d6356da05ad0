"""Rows that are run for what only a machine can answer: facts, costs, deaths, other namespaces, other libraries."""

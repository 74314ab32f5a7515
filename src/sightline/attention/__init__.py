"""Causal attention over the paged K/V cache: the interface and its backends."""

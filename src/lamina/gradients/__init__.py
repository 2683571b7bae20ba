"""Reducers: how the gradients of data-parallel workers become one.

reducer  the protocol, averaging, the DDP and after-backward adapters
robust   coordinate-wise median (and later: trimmed mean, Krum, ...)
"""

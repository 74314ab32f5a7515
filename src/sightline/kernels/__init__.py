"""Kernels that won a measurement, each beside the plain torch that it must equal. None yet."""

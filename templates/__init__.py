"""Jinja templates of kernels, and the device modules they import: what ends up inside a kernel."""

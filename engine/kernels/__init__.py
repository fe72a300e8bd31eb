"""Kernels: operators with a native implementation on the CPU, and with torch's everywhere."""

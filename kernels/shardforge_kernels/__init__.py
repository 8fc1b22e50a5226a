"""Kernels of ShardForge: torch and triton only, nothing of the framework. Each kernel has its reference beside it."""

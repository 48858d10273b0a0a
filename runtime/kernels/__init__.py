"""Kernels for the smelt:: operators: C++ for CPUs, compiled on first use and cached (`build`)."""

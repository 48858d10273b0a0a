"""Triton kernels and the operators that launch them. Imported where a program runs them: not on the
CPU, unless the interpreter (TRITON_INTERPRET=1) stands in for a device."""

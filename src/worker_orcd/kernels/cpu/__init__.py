"""The CPU: a reference in torch (the oracle), and native quantised kernels in C."""

"""Triton kernels of nf_engine, imported as nf_engine.kernels; they import nothing of nf_engine.

`kernels` alone is the name of an unrelated package on PyPI, so that an import by that name is refused.
"""

if __name__ == "kernels":
    raise ImportError("this folder is imported as nf_engine.kernels; install nf-engine and import nf_engine.kernels")

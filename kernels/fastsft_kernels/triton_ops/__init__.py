"""The Triton implementations: one file per op, each with the name and signature of its reference.

Imported only when an op runs on Triton, so that the package imports where Triton is not.
"""

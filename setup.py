"""One entry that setup metadata cannot hold: `fastsft_kernels` lives in `kernels/`.

`kernels/` itself must never become a package: a regular package of that name in the working
directory shadows Hugging Face's `kernels`, which transformers imports.
"""

from setuptools import setup

setup(package_dir={"fastsft_kernels": "kernels/fastsft_kernels"})

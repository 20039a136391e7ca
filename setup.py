"""Maps the two import packages to their folders; everything else is static in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=["sgpo_kernels", *find_packages(include=["sgpo", "sgpo.*"])],
    package_dir={"sgpo_kernels": "kernels/sgpo_kernels", "sgpo": "sgpo"},
)

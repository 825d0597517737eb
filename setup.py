"""Maps the top-level folder ``kernels/`` to the package ``pdarts_fast.kernels``.

``pyproject.toml`` holds everything else: setuptools takes a mapped package folder only from here.
"""

from setuptools import find_packages, setup

subpackages = find_packages("kernels")
setup(
    packages=[
        *find_packages(include=["pdarts_fast", "pdarts_fast.*"]),
        "pdarts_fast.kernels",
        *(f"pdarts_fast.kernels.{name}" for name in subpackages),
    ],
    package_dir={"pdarts_fast.kernels": "kernels"},
)

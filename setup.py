"""Package `configs/`, which lies at the top level, as `saap_jax.configs`; all else is said in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["saap_jax*"]),
        "saap_jax.configs",
        "saap_jax.configs.gates",
        "saap_jax.configs.papers",
    ],
    package_dir={"saap_jax.configs": "configs"},
)

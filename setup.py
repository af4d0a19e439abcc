"""Packaging of frozen_fast and of its kernel library frozen_kernels."""

from setuptools import find_packages, setup

setup()

"""Measurements that a user repeats on their own machine: `python -m cifar.bench`."""

"""Train an image classifier on CIFAR-10 and look at its mistakes."""

__version__ = "0.1.0"

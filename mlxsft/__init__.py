"""Instruction-tune a language model on your own laptop, offline, and know that it got better."""

__version__ = "0.1.0"

"""Prompts and pictures -> `Conditioning`: all that sampling needs of them."""

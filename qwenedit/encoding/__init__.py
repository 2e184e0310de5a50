"""Prompts and pictures -> `Conditioning`: all that sampling needs to know of them."""

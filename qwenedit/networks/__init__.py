"""The three networks, each whole in a file or two. They import `taps` alone."""

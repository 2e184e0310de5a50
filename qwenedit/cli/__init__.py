"""The command line: its options, what its commands do, and the files that they write."""

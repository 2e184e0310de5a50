"""Lists of edits: their lines, public benchmarks as such lists, and the run that makes them."""

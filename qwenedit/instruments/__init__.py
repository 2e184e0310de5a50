"""What looks into a run, or runs it in another way: records, patches, maps, traces, inversion."""

"""Tools that look into a run or vary it: records, patches, attention maps, traces, inversion, determinism."""

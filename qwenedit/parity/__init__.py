"""The comparison with the reference on a user's machine, module by module: `qwenedit parity`."""

"""The three networks, each in one or two files. Of the rest of the package they import only `taps`."""

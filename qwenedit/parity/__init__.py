"""`qwenedit parity`: compare a checkpoint's modules with the reference's on the user's machine."""

"""Each kind of fault that was seen in use, by attack or by comparison, with other instances of its kind."""

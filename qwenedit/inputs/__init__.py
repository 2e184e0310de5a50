"""A caller's input, prepared for the networks: sizes, pictures, token ids, patches."""

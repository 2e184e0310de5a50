"""What a caller gives, brought to what the networks take: sizes, pictures, token ids, patches."""

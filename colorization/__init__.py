"""Films in colour: colour space, video sessions and the two networks."""

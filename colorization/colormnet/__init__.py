"""ColorMNet (ECCV 2024): its networks and their memory."""

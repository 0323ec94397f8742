"""What each `hotpath` command does, and its options where `cli` does not declare them."""

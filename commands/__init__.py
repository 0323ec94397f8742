"""What each `hotpath` command does; the options are declared in `cli`."""

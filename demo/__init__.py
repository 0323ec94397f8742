"""The demo: its inputs, its small models and the scripts that made them."""

"""What is attached to a ComfyUI MODEL or conditioning. Clone, patch, return: nothing upstream is ever mutated."""

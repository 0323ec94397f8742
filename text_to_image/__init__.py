"""Text to image on Hugging Face-format checkpoints of the Z-Image family, with and without ComfyUI."""

"""Runs API-format workflow JSON made of our nodes without ComfyUI, and queues it on one that runs."""

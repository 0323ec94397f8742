"""Faces: detection, alignment, embedding and drawing. torch in, torch out; no ComfyUI inside."""

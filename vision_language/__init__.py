"""Qwen-VL: loading, token budgets, image embeddings, generation, captioning."""

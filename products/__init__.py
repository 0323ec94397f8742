"""Matrix products and convolutions on a CPU with their weights in oneDNN's order; torch only."""

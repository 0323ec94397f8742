"""Matrix products and convolutions with their weights in the order that a device wants: oneDNN on a CPU, Metal; torch only."""

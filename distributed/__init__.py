"""One job per item over many workers: processes of this machine, one per GPU, or the actors of a Ray cluster."""

"""Deep Exemplar-based Video Colorization (CVPR 2019): its networks."""

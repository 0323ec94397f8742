"""Attention kernels and their torch references. torch and Triton only."""

"""Building blocks that model files are made of: plain torch, one clear equal for every fused kernel to come."""

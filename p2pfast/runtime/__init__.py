"""Planning and running fused graphs."""

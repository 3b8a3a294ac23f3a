"""Training pix2pix, pix2pixHD and CycleGAN: configurations, objectives, the loop, runs on disk."""

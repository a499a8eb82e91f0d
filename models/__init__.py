"""What is computed: MAGI-1, its autoencoder and text encoders, attention backends, and the pocket model."""

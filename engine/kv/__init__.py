"""Keys and values of a request: one allocation per layer at admission, nothing grows with the length of the video."""

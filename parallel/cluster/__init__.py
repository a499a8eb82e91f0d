"""Many videos on many gangs: the chunk scheduler, and the Ray layer that carries out what it says."""

"""Many videos on many gangs: the scheduler, and the controller that carries out its decisions on Ray."""

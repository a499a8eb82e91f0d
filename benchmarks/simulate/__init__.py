"""Layouts that are not at hand: the order of work of the engine on a virtual clock."""

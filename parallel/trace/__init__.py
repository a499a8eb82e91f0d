"""What each rank did when, and what it counted."""

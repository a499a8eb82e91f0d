"""Failures during a batch of videos."""

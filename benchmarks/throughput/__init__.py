"""How fast are very long videos made, what do they take, and what becomes of them?"""

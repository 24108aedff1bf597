"""The search for a plan under a budget."""

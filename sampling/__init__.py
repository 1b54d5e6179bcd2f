"""For step 4: how a token is chosen, faster ways to compute it, and how it is shown."""

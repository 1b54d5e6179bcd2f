"""For step 3: what a training is made of, what is checked and told before it, and what it tells afterwards."""

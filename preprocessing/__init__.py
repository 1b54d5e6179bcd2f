"""For steps 1 and 2: where stories come from, their words, worker processes, and the files of token ids."""

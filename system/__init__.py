"""What the machine gives: devices, cores and memory, files."""

"""What a report says of runs: what their directories hold, in words, numbers and curves. Loads without torch."""

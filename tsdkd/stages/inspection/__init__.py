"""What the method does, token by token and over a whole artifact; recorded scores are looked at without torch."""

"""How much attention to compressed keys falls into each block of tokens: what NSA selects blocks by."""

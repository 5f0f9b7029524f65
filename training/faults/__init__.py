"""What goes wrong: bad steps, signals, ranks that hang or die."""

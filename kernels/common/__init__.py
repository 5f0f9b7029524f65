"""What both kinds of kernels share: tiles, visibility, launches, checks of arguments."""

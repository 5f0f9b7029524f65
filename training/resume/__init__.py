"""Where a run starts: its folder, its checkpoint, the settings that must agree, weights of another run."""

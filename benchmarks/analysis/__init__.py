"""Programs whose pictures and numbers stand in results/."""

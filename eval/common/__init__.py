"""What every evaluation shares: options, scoring, kept results, where numbers come from, wandb."""

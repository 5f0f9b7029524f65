"""Training: the LightningModule, its optimizer and loss, checkpoints, tracking and the command line of train.py."""

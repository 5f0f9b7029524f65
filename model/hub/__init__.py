"""Models of the Hugging Face hub: their architectures as ours and back, their weights' names, conversion, export."""

"""α-entmax attention: the public function, its Triton passes, the blockwise PyTorch path, the dense reference."""

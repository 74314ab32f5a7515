"""Messages and pictures in, token ids and uint8 pixels out. CPU only, no torch."""

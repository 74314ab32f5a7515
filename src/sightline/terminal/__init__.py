"""Commands for people and scripts that are clients of a server: `sightline batch` and `sightline chat`."""

"""sightline inside other people's serving frameworks; each has an extra of its own."""

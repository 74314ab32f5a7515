"""What outlives a step: pages of K/V, prefixes, pictures' features. Plain Python: no tensor is touched here."""

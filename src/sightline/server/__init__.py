"""HTTP: routes, wire types, probes. This process imports no torch."""

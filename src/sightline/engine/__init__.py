"""The engine: scheduler, runner, sampler, and the clients that drive it from a server or from a script."""

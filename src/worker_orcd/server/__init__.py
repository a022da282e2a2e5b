"""HTTP in, HTTP out (asyncio). Knows the engine by its messages, never a tensor."""

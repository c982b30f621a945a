"""Signatures by keys that this process does not hold: workers that own the tokens, and an asyncio pool that asks them.

`hsm.pool.SignerPool` asks workers, `hsm.launcher.open_pool` also starts them. Nothing here knows of TLS servers.
"""
